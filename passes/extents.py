"""Graph nodes that hold symbolic extents, computed from the shapes of the inputs alone."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from sparsify.passes.graph import Extent, aten
from sparsify.rewriter import Rewriter

_FOLDS: dict[type, Callable[..., Any]] = {sympy.Add: operator.add, sympy.Mul: operator.mul}
_DIVISIONS = ("FloorDiv", "CleanDiv")


class Extents:
    """Finds or inserts the nodes behind the extents of one graph.

    They stand right behind the inputs, so that every later node may use them and no activation
    stays alive for its shape.
    """

    def __init__(self, rewriter: Rewriter) -> None:
        self._rewriter = rewriter
        self._symbols: dict[sympy.Expr, tuple[fx.Node, int | None]] = {}
        for source in rewriter.graph.nodes:
            if source.op != "placeholder":
                continue
            value = source.meta.get("val")
            if isinstance(value, torch.SymInt):
                self._symbols.setdefault(value.node.expr, (source, None))
            for dim, extent in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(extent, torch.SymInt):
                    self._symbols.setdefault(extent.node.expr, (source, dim))

    def covers(self, extent: Extent) -> bool:
        """Whether the extent is computed from the shapes of the inputs."""
        return isinstance(extent, int) or self._covers(extent.node.expr)

    def node(self, extent: Extent) -> int | fx.Node:
        """A constant or a graph node equal to ``extent``.

        Raises:
            ValueError: the extent depends on a symbol that is no dimension of an input.
        """
        if isinstance(extent, int):
            return extent
        if not self._covers(extent.node.expr):
            raise ValueError(
                f"the extent {extent} is not computed from the shapes of the inputs, which have "
                f"{list(self._symbols)}; export with it as an input dimension"
            )
        return self._build(extent.node.expr)

    def _covers(self, expression: sympy.Expr) -> bool:
        if expression.is_Integer or expression in self._symbols:
            return True
        known = type(expression) in _FOLDS or type(expression).__name__ in _DIVISIONS
        return known and all(map(self._covers, expression.args))

    def _build(self, expression: sympy.Expr) -> int | fx.Node:
        if expression.is_Integer:
            return int(expression)
        if expression in self._symbols:
            source, dim = self._symbols[expression]
            return source if dim is None else self._call(aten.sym_size.int, (source, dim))
        operands = tuple(map(self._build, expression.args))
        if type(expression) not in _FOLDS:
            return self._call(operator.floordiv, operands)
        total, *rest = operands
        for operand in rest:
            total = self._call(_FOLDS[type(expression)], (total, operand))
        return total

    def _call(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        operand = next(a for a in args if isinstance(a, fx.Node))
        last = self._last()
        for user in operand.users:
            if user.target == target and user.args == args:
                if not user <= last:
                    last.append(user)
                return user
        with self._rewriter.graph.inserting_after(last):
            return self._rewriter.call(target, args)

    def _last(self) -> fx.Node:
        """The last of the inputs and of the extents that already follow them."""
        last = None
        for node in self._rewriter.graph.nodes:
            if node.op != "placeholder" and not isinstance(node.meta.get("val"), torch.SymInt):
                break
            last = node
        assert last is not None
        return last
