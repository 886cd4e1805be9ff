"""Projections that share an input run as one linear."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify import ops
from sparsify.passes.graph import arguments, aten, shape_of
from sparsify.passes.sites import is_disabled, merged_name, named_weight, site_name
from sparsify.program import GraphPass, PassContext, Rewriter
from sparsify.report import Decision

_ATTENTION = ops.fused_attention.overload
_SLOTS = ("query", "key", "value")


@dataclass(frozen=True)
class MergeProjections(GraphPass):
    """Linears of one input that only feed one attention become one, its rows concatenated.

    Before::

        x -> linear(Wq) --+
        x -> linear(Wk) --+-> fused_attention(q, k, v, offsets=[0, 0, 0])
        x -> linear(Wv) --+

    After::

        x -> linear(cat(Wq, Wk, Wv)) -> fused_attention(y, y, y, offsets=[0, q_rows, q_rows+k_rows])

    In cross attention, keys and values share. A missing bias is filled with zeros when another
    projection has one. Run it after `FuseAttention`.
    """

    name = "merge_projections"
    tolerance = 1e-5

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        for attention in rewriter.nodes:
            if attention.target != _ATTENTION:
                continue
            groups: dict[tuple[fx.Node, bool], list[fx.Node]] = {}
            for linear in dict.fromkeys(_slots(attention)):
                if _is_private(rewriter, linear, attention):
                    operands = arguments(linear)
                    site = site_name(named_weight(rewriter, operands["weight"])[0])
                    key = (operands["input"], is_disabled(site, context.disabled_sites))
                    groups.setdefault(key, []).append(linear)
            for linears in groups.values():
                if len(linears) > 1:
                    yield self._merge(rewriter, attention, linears)

    def _merge(self, rewriter: Rewriter, attention: fx.Node, linears: list[fx.Node]) -> Decision:
        operands = [arguments(linear) for linear in linears]
        names, weights = zip(*(named_weight(rewriter, o["weight"]) for o in operands), strict=True)
        name = merged_name(names)
        weight = rewriter.add_weight(name, torch.cat(weights))
        bias = _merged_bias(rewriter, operands, weights, site_name(name))
        first = min(linears, key=list(rewriter.graph.nodes).index)
        with rewriter.graph.inserting_before(first):
            merged = rewriter.call(aten.linear.default, (operands[0]["input"], weight, bias))
        starts: dict[fx.Node, int] = {}
        row = 0
        for linear, matrix in zip(linears, weights, strict=True):
            starts[linear] = row
            row += matrix.shape[0]
        options = arguments(attention)
        slots = _slots(attention)
        offsets = [
            offset + starts.get(slot, 0)
            for offset, slot in zip(options["offsets"], slots, strict=True)
        ]
        for slot, operand in zip(_SLOTS, slots, strict=True):
            options[slot] = merged if operand in starts else operand
        attention.args = tuple({**options, "offsets": offsets}.values())
        return Decision(
            site_name(name),
            "linear",
            "rewritten",
            f"{len(linears)} projections of one input run as one linear with {row} rows",
            self.name,
            shape=(row, weights[0].shape[1]),
        )


def _slots(attention: fx.Node) -> list[fx.Node]:
    options = arguments(attention)
    return [options[slot] for slot in _SLOTS]


def _is_private(rewriter: Rewriter, node: fx.Node, attention: fx.Node) -> bool:
    """Whether a node is a linear with constant operands that only ``attention`` reads."""
    if node.target != aten.linear.default or set(node.users) != {attention}:
        return False
    operands = arguments(node)
    bias = operands["bias"]
    return (
        rewriter.weight_of(operands["weight"]) is not None
        and len(shape_of(operands["weight"])) == 2
        and (bias is None or rewriter.weight_of(bias) is not None)
        and node is not arguments(attention)["mask"]
    )


def _merged_bias(
    rewriter: Rewriter, operands: list[dict[str, Any]], weights: Sequence[torch.Tensor], site: str
) -> fx.Node | None:
    biases = [rewriter.weight_of(o["bias"]) for o in operands]
    if all(bias is None for bias in biases):
        return None
    filled = [
        weight.new_zeros(weight.shape[0]) if bias is None else bias
        for bias, weight in zip(biases, weights, strict=True)
    ]
    return rewriter.add_weight(f"{site}.bias", torch.cat(filled))
