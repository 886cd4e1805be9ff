"""What chooses among experts in an exported graph, taken out of it and compared with our routers.

    linear -> logits -> (any operators and constants) -> experts, weights -> sparsify::experts

What lies between the last linear and the experts is a function of a token's logits. It is run on
made-up ones (see `sparsify.routers.recognition`), so no way of writing a router is a pattern here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree

from sparsify import ops
from sparsify.passes.graph import aten, hint, same
from sparsify.rewriter import Rewriter
from sparsify.routers import Candidate, Seen, gates_of, recognise

_LINEARS = (
    aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default,
    ops.sparse_linear.overload,
)  # fmt: skip
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._to_copy.default)

_MOST_NODES = 200
"""Of a router."""


@dataclass(frozen=True, eq=False)
class RouterCode:
    """The part of a graph that makes routes of logits.

    Attributes:
        logits: the node of ``[tokens, width]``.
        made: the experts and their weights, nodes of ``[tokens, slots]``, or one node of
            ``[tokens, count]``: what each expert counts, 0 where it is not chosen.
        nodes: those that lead from the logits to these, in order.
    """

    rewriter: Rewriter
    logits: fx.Node
    made: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]

    @classmethod
    def of(cls, rewriter: Rewriter, *made: fx.Node) -> RouterCode | None:
        """The code behind routes; None where it is no function of one linear's result."""
        inner: set[fx.Node] = set()
        borders: set[fx.Node] = set()
        waiting = list(made)
        while waiting:
            node = waiting.pop()
            if node in inner or node in borders or rewriter.weight_of(node) is not None:
                continue
            if isinstance(node.meta.get("val"), torch.SymInt):
                continue
            if node.target in _LINEARS or node.op != "call_function":
                borders.add(node)
                continue
            inner.add(node)
            waiting.extend(node.all_input_nodes)
            if len(inner) > _MOST_NODES:
                return None
        if len(borders) != 1:
            return None
        (logits,) = borders
        while not _is_logits(logits):
            steps = [user for user in logits.users if user in inner]
            if len(steps) != 1 or steps[0].target not in _VIEWS:
                return None
            (logits,) = steps
            inner.discard(logits)
        if logits in made:
            return None
        nodes = tuple(node for node in rewriter.nodes if node in inner)
        return cls(rewriter, logits, made, nodes)

    def router(self, count: int) -> Candidate | None:
        """The router of ours that this is."""
        tokens, width = self.logits.meta["val"].shape
        slots = self.made[0].meta["val"].shape[1] if len(self.made) == 2 else None
        if isinstance(slots, torch.SymInt) or not same(self.made[0].meta["val"].shape[0], tokens):
            return None
        leaves = _pytree.tree_leaves([(node.args, node.kwargs) for node in self.nodes])
        numbers = [
            float(x) for x in leaves if isinstance(x, int | float) and not isinstance(x, bool)
        ]
        seen = Seen(count, slots, tuple(dict.fromkeys(numbers)), tuple(self._constants.values()))
        return recognise(lambda x: self._run(x, count), seen, hint(tokens), width)

    @cached_property
    def _constants(self) -> dict[fx.Node, torch.Tensor]:
        """The tensors that the code has beside logits."""
        found = {}
        for operand in dict.fromkeys(n for node in self.nodes for n in node.all_input_nodes):
            tensor = self.rewriter.weight_of(operand)
            if tensor is not None:
                found[operand] = tensor.detach()
        return found

    def _run(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        known: dict[fx.Node, Any] = {self.logits: logits, **self._constants}

        def value(node: fx.Node) -> Any:
            return known[node] if node in known else hint(node.meta["val"])

        def plain(x: Any) -> Any:
            return hint(x) if isinstance(x, torch.SymInt) else x

        with torch.no_grad():
            for node in self.nodes:
                args = fx.node.map_aggregate(fx.node.map_arg(node.args, value), plain)
                kwargs = fx.node.map_aggregate(fx.node.map_arg(node.kwargs, value), plain)
                assert callable(node.target)
                known[node] = node.target(*args, **kwargs)
        found = [known[node] for node in self.made]
        return found[0] if len(found) == 1 else gates_of(found[0], found[1], count)


def _is_logits(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 2
        and value.dtype == torch.float32
        and isinstance(value.shape[1], int)
    )
