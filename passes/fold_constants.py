"""What depends on weights alone is computed once, at compile time."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsify.contracts import GraphPass, PassContext
from sparsify.passes.graph import aten
from sparsify.report import Decision
from sparsify.rewriter import Rewriter

_FILLS = (aten.full.default, aten.full_like.default, aten.scalar_tensor.default)
"""Left in the graph: other passes read the one value, and TVM folds it into its users."""
_UNDEFINED = (aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default)


@dataclass(frozen=True)
class FoldConstants(GraphPass):
    """Sub-graphs over weights, constants and static shapes become weights.

    Before::

        g [n, 1] ------------------------+
        v [n, k] -> norm -> div(v, .) -> mul -> W [n, k]
                                            x -> linear(x, W)

    After::

        p_W [n, k]    x -> linear(x, p_W)

    A result larger than ``max_bytes`` is folded only if it is no larger than what it is made of,
    so an expanded weight stays expanded at run time.

    Attributes:
        max_bytes: largest result that may outgrow its operands.
    """

    name: ClassVar[str] = "fold_constants"
    max_bytes: int = 1 << 20

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        constant = self._constant_nodes(rewriter)
        values: dict[fx.Node, Any] = {}
        for node in rewriter.nodes:
            if node not in constant or node.op != "call_function" or node.target in _FILLS:
                continue
            if all(user in constant for user in node.users):
                continue
            value = _evaluate(rewriter, node, values)
            if isinstance(value, torch.Tensor):
                yield self._fold(rewriter, node, value.contiguous(), constant)

    def _constant_nodes(self, rewriter: Rewriter) -> set[fx.Node]:
        constant: set[fx.Node] = set()
        for node in rewriter.nodes:
            known = rewriter.weight_of(node) is not None
            if node.op == "call_function" and _is_pure(node):
                known = constant.issuperset(node.all_input_nodes) and self._fits(node)
            if known:
                constant.add(node)
        return constant

    def _fits(self, node: fx.Node) -> bool:
        results = _tensors(node)
        if results is None:
            return False
        operands = [t for n in node.all_input_nodes for t in _tensors(n) or []]
        size = sum(t.numel() * t.element_size() for t in results)
        return size <= max(self.max_bytes, sum(t.numel() * t.element_size() for t in operands))

    def _fold(
        self, rewriter: Rewriter, node: fx.Node, value: torch.Tensor, constant: set[fx.Node]
    ) -> Decision:
        region = _region(node, constant)
        sources = [n for n in map(rewriter.weight_name, region) if n is not None]
        name = _unused_name(rewriter, sources, node, value)
        weight = rewriter.add_weight(name, value)
        constant.add(weight)
        rewriter.replace(node, weight)
        count = sum(n.op == "call_function" for n in region)
        made_of = f" over {', '.join(sorted(sources))}" if sources else ""
        reason = f"{count} node{'s' if count > 1 else ''}{made_of} computed once"
        return Decision(name, "constant", "rewritten", reason, self.name, tuple(value.shape))


def _is_pure(node: fx.Node) -> bool:
    if node.target == operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target in _UNDEFINED:
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags


def _tensors(node: fx.Node) -> list[torch.Tensor] | None:
    """The tensors that a node makes, None unless all have static shapes."""
    value = node.meta.get("val")
    found = list(value) if isinstance(value, tuple | list) else [value]
    for tensor in found:
        if not isinstance(tensor, torch.Tensor):
            return None
        if not all(isinstance(size, int) for size in tensor.shape):
            return None
    return found


def _region(node: fx.Node, constant: set[fx.Node]) -> set[fx.Node]:
    """The node and everything it is computed from."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    assert seen <= constant
    return seen


def _evaluate(rewriter: Rewriter, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node not in values:
        weight = rewriter.weight_of(node)
        if weight is not None:
            values[node] = weight.detach()
        else:
            for operand in node.all_input_nodes:
                _evaluate(rewriter, operand, values)
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    return values[node]


def _unused_name(rewriter: Rewriter, sources: list[str], node: fx.Node, value: torch.Tensor) -> str:
    """Named after what it is made of: ``conv.weight.original0/1`` give ``conv.weight_folded``."""
    levels = zip(*(name.split(".") for name in sources), strict=False)
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, levels)
    base = ".".join(level[0] for level in shared) or node.name
    # A suffix, not a level: "w" cannot be both a tensor and a module that holds tensors.
    candidates = itertools.chain(("",), (f"_{i}" for i in itertools.count(1)))
    names = (f"{base}_folded{i}" for i in candidates)
    return next(name for name in names if rewriter.may_name(name, value))
