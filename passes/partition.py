"""Cuts a program into regions that are compiled and regions that stay with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import fx

from sparsify.contracts import GraphPass, PassContext
from sparsify.effects import order_of_effects
from sparsify.plan import REGION, Kind, Sizes, is_number
from sparsify.report import Decision
from sparsify.rewriter import Rewriter

Unsupported = Callable[[fx.Node], str | None]

_CHEAP = frozenset({"to_lanes", "from_lanes"})
_COSTLY = frozenset(
    {
        *("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "embedding"),
        *("convolution", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention"),
        *("softmax", "_softmax", "layer_norm", "native_layer_norm"),
    }
)
"""ATen operators worth a region of their own; every operator of ours is, conversions apart."""


@dataclass(frozen=True)
class Partition(GraphPass):
    """Marks each node with its region, and orders the nodes region after region.

    Before::

        x -> linear -> histc -> add -> linear -> y          histc cannot be compiled

    After::

        x -> linear  |  -> histc -> add  |  -> linear -> y
          forward_      forward_            forward_
          region_0      region_1            region_2
          compiled      torch               compiled

    Regions are as large and as few as the order of the graph allows: all that can run of one
    kind runs before the other kind gets its turn. Calls that change a tensor and calls that read it
    keep their order. A compiled region of a few cheap operators
    between operators left to PyTorch is left to PyTorch as well. A program that can be compiled
    throughout is one region. Specialising: run it last, with ``PassContext.unsupported``.

    Attributes:
        min_nodes: a compiled region without a costly operator needs this many nodes.

    Raises:
        ValueError: with ``strict``, naming the first operator that cannot be compiled and why.
    """

    min_nodes: int = 32

    name = "partition"

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        graph = _Graph(rewriter)
        reasons = graph.reasons(context.unsupported or (lambda node: None))
        if reasons and context.strict:
            node, reason = next(iter(reasons.items()))
            raise ValueError(
                f"strict=True: node {node.name} ({node.target}) of shape {_shape(node)} cannot be "
                f"compiled: {reason}; replace the operator, or compile with strict=False to leave "
                "it to PyTorch"
            )
        left = set(reasons)
        regions = graph.regions(left)
        tiny: list[fx.Node] = []
        while left and (found := self._tiny(regions)):
            tiny += found
            left.update(found)
            regions = graph.regions(left)
        ordered = []
        named = [(f"{rewriter.name}_region_{i}", *r) for i, r in enumerate(regions)]
        for name, kind, nodes in named:
            for node in nodes:
                node.meta[REGION] = (name, kind)
                ordered.append(node)
        _reorder(rewriter.graph, ordered)
        yield from _decisions(named, reasons, tiny, self.name)

    def _tiny(self, regions: list[tuple[Kind, list[fx.Node]]]) -> list[fx.Node]:
        return [
            node
            for kind, nodes in regions
            if kind == "compiled" and len(nodes) < self.min_nodes and not any(map(_costs, nodes))
            for node in nodes
        ]


class _Graph:
    """The order of a program's operators, sizes left out: regions compute those themselves."""

    def __init__(self, rewriter: Rewriter) -> None:
        inputs = [n for n in rewriter.nodes if n.op == "placeholder"]
        self.sizes = Sizes(n for n in inputs if rewriter.weight_name(n) is None)
        self.nodes = [
            n for n in rewriter.nodes if n.op == "call_function" and not self.sizes.is_size(n)
        ]
        members = set(self.nodes)
        effects = order_of_effects(self.nodes)
        self.before = {
            n: [s for s in (*self.sizes.sources(n), *effects[n]) if s in members]
            for n in self.nodes
        }

    def reasons(self, unsupported: Unsupported) -> dict[fx.Node, str]:
        """Why each node that cannot be compiled cannot; parts of a tuple stay with their maker."""
        found: dict[fx.Node, str] = {}
        for node in self.nodes:
            reason = self._unknown_size(node) or unsupported(node)
            if reason is None and _is_part(node) and node.args[0] in found:
                reason = found[node.args[0]]
            if reason is not None:
                found[node] = reason
        for node in reversed(self.nodes):
            if _is_part(node) and node in found:
                found.setdefault(node.args[0], found[node])
        for node in self.nodes:
            if _is_part(node) and node.args[0] in found:
                found.setdefault(node, found[node.args[0]])
        return {node: found[node] for node in self.nodes if node in found}

    def regions(self, left: set[fx.Node]) -> list[tuple[Kind, list[fx.Node]]]:
        """The shorter of the two schedules: compiled first, or PyTorch first."""
        schedules = [self._schedule(left, "compiled"), self._schedule(left, "torch")]
        return min(schedules, key=len)

    def _schedule(self, left: set[fx.Node], kind: Kind) -> list[tuple[Kind, list[fx.Node]]]:
        regions: list[tuple[Kind, list[fx.Node]]] = []
        done: set[fx.Node] = set()
        waiting = self.nodes
        while waiting:
            ran, rest = [], []
            for node in waiting:
                of_kind = (node in left) == (kind == "torch")
                if of_kind and all(source in done for source in self.before[node]):
                    ran.append(node)
                    done.add(node)
                else:
                    rest.append(node)
            if ran:
                regions.append((kind, ran))
            waiting = rest
            kind = "torch" if kind == "compiled" else "compiled"
        return regions

    def _unknown_size(self, node: fx.Node) -> str | None:
        """A reason when a node's sizes follow from the values of a tensor, not from its shape."""
        for operand in (node, *node.all_input_nodes):
            if is_number(operand) and not self.sizes.is_size(operand):
                return "a number depends on the values of a tensor"
            for symbol in sorted(self.sizes.unbound(operand), key=str):
                return f"the size {symbol} is no dimension of any input of the model"
        return None


def _is_part(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _costs(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    namespace, _, name = node.target._schema.name.partition("::")
    return name in _COSTLY or (namespace == "sparsify" and name not in _CHEAP)


def _reorder(graph: fx.Graph, ordered: list[fx.Node]) -> None:
    """Puts the nodes in this order; sizes go before the first node that reads them."""
    placed: set[fx.Node] = {n for n in graph.nodes if n.op == "placeholder"}
    final = next(n for n in graph.nodes if n.op == "output")

    def place(node: fx.Node) -> None:
        if node in placed:
            return
        for operand in node.all_input_nodes:
            place(operand)
        final.prepend(node)
        placed.add(node)

    for node in ordered:
        place(node)
    for node in final.all_input_nodes:
        place(node)


def _decisions(
    regions: list[tuple[str, Kind, list[fx.Node]]],
    reasons: Mapping[fx.Node, str],
    tiny: list[fx.Node],
    made_by: str,
) -> Iterable[Decision]:
    for region, kind, nodes in regions:
        if kind == "compiled":
            continue
        failed = sorted((n for n in nodes if n in reasons), key=lambda n: _cause(n, reasons))
        for (operator, reason), group in groupby(failed, key=lambda n: _cause(n, reasons)):
            members = list(group)
            count = f" ({len(members)} nodes)" if len(members) > 1 else ""
            yield Decision(
                members[0].name,
                operator,
                "unsupported",
                f"left to PyTorch in {region}{count}: {reason}",
                made_by,
                shape=_shape(members[0]),
            )
        beside = [n for n in nodes if n in tiny]
        if beside:
            yield Decision(
                beside[0].name,
                "region",
                "skipped",
                f"{len(beside)} cheap operators stay in PyTorch with {region}: a compiled "
                "region of their own would cost more than it saves",
                made_by,
            )


def _cause(node: fx.Node, reasons: Mapping[fx.Node, str]) -> tuple[str, str]:
    return str(node.target), reasons[node]


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The shape on the example inputs."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(e if isinstance(e, int) else int(e.node.hint or 0) for e in value.shape)
