"""Attention on unsplit projections: the split into heads and its transpositions go away."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify import ops
from sparsify.contracts import GraphPass, PassContext
from sparsify.passes.graph import (
    Extent,
    arguments,
    aten,
    same,
    shape_of,
)
from sparsify.passes.heads import Heads, as_rows, heads_of, replace_by_rows
from sparsify.passes.sites import common_head, site_name
from sparsify.passes.strided import strided
from sparsify.report import Decision
from sparsify.rewriter import Rewriter


@dataclass(frozen=True)
class FuseAttention(GraphPass):
    """Scaled dot-product attention becomes ``fused_attention`` on row-major activations.

    Before::

        q: [b, s, h*d] -> view [b, s, h, d] -> permute [b, h, s, d] -+
        k: likewise -------------------------------------------------+-> sdpa -> permute -> view
        v: likewise, or repeated over the heads of a group ----------+           [b, s, h*d]

    After::

        q, k, v -> fused_attention(q, k, v, mask, heads, kv_heads, head_dim, offsets, ...)

    Any spelling of the split is understood (view, unflatten, transpose, chunk, select ...). An
    operand that does not come straight from a row-major tensor, as after rotary embedding, is
    transposed first.
    """

    name = "fuse_attention"
    tolerance = 1e-5

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        for node in rewriter.nodes:
            if node.target == aten.scaled_dot_product_attention.default:
                yield self._fuse(rewriter, node)

    def _fuse(self, rewriter: Rewriter, node: fx.Node) -> Decision:
        reason = _misfit(node)
        site = _site(rewriter, node)
        if reason is not None:
            return Decision(site, "attention", "skipped", reason, self.name)
        options = arguments(node)
        query, key, value = (options[name] for name in ("query", "key", "value"))
        heads, head_dim = shape_of(query)[1], shape_of(query)[3]
        split = [heads_of(operand) for operand in (query, key, value)]
        kv_heads = _shared_heads(split[1], split[2], shape_of(key)[1])
        split[1:] = [part if part and part.count == kv_heads else None for part in split[1:]]
        with rewriter.graph.inserting_before(node):
            parts = [
                as_rows(rewriter, operand) if part is None else part.rows(rewriter)
                for operand, part in zip((query, key, value), split, strict=True)
            ]
            scale = options["scale"]
            rows = rewriter.call(
                ops.fused_attention.overload,
                (
                    *parts,
                    _mask(rewriter, options["attn_mask"]),
                    heads,
                    kv_heads,
                    head_dim,
                    [0 if part is None else part.offset for part in split],
                    head_dim**-0.5 if scale is None else float(scale),
                    options["is_causal"],
                ),
            )
            replace_by_rows(rewriter, node, rows)
        names = ("query", "key", "value")
        moved = [name for name, part in zip(names, split, strict=True) if part is None]
        reason = f"{heads} heads of {head_dim} features read straight from the projections"
        if moved:
            reason = f"fused; {' and '.join(moved)} are computed after the split and copied back"
        return Decision(site, "attention", "rewritten", reason, self.name)


def _misfit(node: fx.Node) -> str | None:
    """Why an attention cannot be fused, None when it can."""
    options = arguments(node)
    query, key, value = (shape_of(options[name]) for name in ("query", "key", "value"))
    if not len(query) == len(key) == len(value) == 4:
        return f"the query has {len(query)} dimensions, not [batch, heads, length, head_dim]"
    if options["dropout_p"] != 0:
        return f"dropout_p is {options['dropout_p']}: export the model in eval mode"
    counts = (query[1], key[1], value[1], query[3], value[3])
    if not all(isinstance(extent, int) for extent in counts):
        return "the number of heads or the head size is dynamic"
    if query[3] != value[3]:
        return f"values have {value[3]} features a head, queries {query[3]}"
    if key[1] != value[1] or query[1] // key[1] * key[1] != query[1]:
        return f"{query[1]} query heads over {key[1]} key heads and {value[1]} value heads"
    if not (same(query[0], key[0]) and same(query[0], value[0])):
        return "query and key differ in batch size"
    dtype = options["query"].meta["val"].dtype
    if dtype != torch.float32:
        return f"activations are {dtype}; the kernel computes in float32"
    return None


def _site(rewriter: Rewriter, node: fx.Node) -> str:
    """The module whose projections feed an attention, or the node's name."""
    options = arguments(node)
    weights = []
    for name in ("query", "key", "value"):
        base = strided(options[name]).base
        linear = base.target == aten.linear.default
        weight = rewriter.weight_name(arguments(base)["weight"]) if linear else None
        if weight is None:
            return node.name
        weights.append(weight)
    if len(set(weights)) == 1:
        return site_name(weights[0])
    common = common_head([name.split(".") for name in weights])
    return ".".join(common) or node.name


def _shared_heads(key: Heads | None, value: Heads | None, full: Extent) -> Extent:
    """How many heads key and value are read with: all, unless both are stored unrepeated."""
    if key is not None and value is not None and key.count == value.count:
        return key.count
    return full


def _mask(rewriter: Rewriter, mask: Any) -> fx.Node | None:
    """The mask with four dimensions; broadcasting aligns the last ones, so leading ones are 1."""
    if mask is None:
        return None
    while len(shape_of(mask)) < 4:
        mask = rewriter.call(aten.unsqueeze.default, (mask, 0))
    return mask
