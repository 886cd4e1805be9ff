"""Attention on unsplit projections: the split into heads and its transpositions go away."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from sparsify import ops
from sparsify.contracts import GraphPass, PassContext
from sparsify.passes.graph import (
    Extent,
    arguments,
    aten,
    erase_dead,
    same,
    shape_of,
)
from sparsify.passes.heads import Heads, as_rows, heads_of, replace_by_rows
from sparsify.passes.mask_structure import NO_MASK, MaskStructure, structure
from sparsify.passes.recompose_attention import PRODUCTS, near_miss, read
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
    transposed first. Masks are taken apart: what positions alone hide becomes ``causal``,
    ``window`` and ``sinks``, so that kernels skip blocks of it; the rest stays a mask. Attention
    with a soft cap, which ``sdpa`` cannot express, is read from its products and softmax.
    """

    name = "fuse_attention"
    tolerance = 1e-5

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        masks: dict[fx.Node, MaskStructure] = {}
        for node in rewriter.nodes:
            if node._erased:
                continue
            with rewriter.graph.inserting_before(node):
                found = _attended(rewriter, node)
            if found is not None:
                yield self._fuse(rewriter, node, found, masks)
        for node in rewriter.nodes:
            if node.target == aten.softmax.int:
                reason = near_miss(node)
                if reason is not None:
                    yield Decision(node.name, "attention", "skipped", reason, self.name)

    def _fuse(
        self,
        rewriter: Rewriter,
        node: fx.Node,
        found: _Attention,
        masks: dict[fx.Node, MaskStructure],
    ) -> Decision:
        reason = _misfit(found)
        site = _site(rewriter, node, found)
        if reason is not None:
            return Decision(site, "attention", "skipped", reason, self.name)
        operands = found.query, found.key, found.value
        heads, head_dim = shape_of(found.query)[1], shape_of(found.query)[3]
        split = [heads_of(operand) for operand in operands]
        kv_heads = _shared_heads(split[1], split[2], shape_of(found.key)[1])
        split[1:] = [part if part and part.count == kv_heads else None for part in split[1:]]
        with rewriter.graph.inserting_before(node):
            parts = [
                as_rows(rewriter, operand) if part is None else part.rows(rewriter)
                for operand, part in zip(operands, split, strict=True)
            ]
            mask = found.mask
            if mask is not None and mask not in masks:
                masks[mask] = structure(rewriter, mask)
            hides = NO_MASK if mask is None else masks[mask]
            causal = found.causal or hides.causal
            rows = rewriter.call(
                ops.fused_attention.overload,
                (
                    *parts,
                    hides.mask,
                    heads,
                    kv_heads,
                    head_dim,
                    [0 if part is None else part.offset for part in split],
                    head_dim**-0.5 if found.scale is None else float(found.scale),
                    causal,
                    [],
                    hides.window,
                    hides.sinks,
                    found.softcap,
                ),
            )
            replace_by_rows(rewriter, node, rows)
            erase_dead(rewriter, node)
        names = ("query", "key", "value")
        moved = [name for name, part in zip(names, split, strict=True) if part is None]
        reason = f"{heads} heads of {head_dim} features read straight from the projections"
        if moved:
            reason = f"fused; {' and '.join(moved)} are computed after the split and copied back"
        if found.softcap:
            reason += f"; scores are capped at {found.softcap:g}"
        if hides.found:
            reason += f"; {hides.found}"
        return Decision(site, "attention", "rewritten", reason, self.name)


@dataclass(frozen=True)
class _Attention:
    """The operands of one attention, however it is spelled."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float | None
    causal: bool = False
    softcap: float = 0.0
    dropout: float = 0.0


def _attended(rewriter: Rewriter, node: fx.Node) -> _Attention | None:
    """What a node attends with, if it is attention of four dimensions or can be made so."""
    if node.target != aten.scaled_dot_product_attention.default:
        found = read(rewriter, node, capped=True) if node.target in PRODUCTS else None
        if found is None or len(shape_of(node)) != 4:
            return None
        parts = found.query, found.key, found.value
        return _Attention(*parts, found.mask, found.scale, softcap=found.softcap)
    options = arguments(node)
    return _Attention(
        *(options[name] for name in ("query", "key", "value")),
        options["attn_mask"],
        options["scale"],
        options["is_causal"],
        dropout=options["dropout_p"],
    )


def _misfit(found: _Attention) -> str | None:
    """Why an attention cannot be fused, None when it can."""
    query, key, value = (shape_of(x) for x in (found.query, found.key, found.value))
    if not len(query) == len(key) == len(value) == 4:
        return f"the query has {len(query)} dimensions, not [batch, heads, length, head_dim]"
    if found.dropout != 0:
        return f"dropout_p is {found.dropout}: export the model in eval mode"
    counts = (query[1], key[1], value[1], query[3], value[3])
    if not all(isinstance(extent, int) for extent in counts):
        return "the number of heads or the head size is dynamic"
    if query[3] != value[3]:
        return f"values have {value[3]} features a head, queries {query[3]}"
    if key[1] != value[1] or query[1] // key[1] * key[1] != query[1]:
        return f"{query[1]} query heads over {key[1]} key heads and {value[1]} value heads"
    if not (same(query[0], key[0]) and same(query[0], value[0])):
        return "query and key differ in batch size"
    dtype = found.query.meta["val"].dtype
    if dtype != torch.float32:
        return f"activations are {dtype}; the kernel computes in float32"
    if found.mask is not None and len(shape_of(found.mask)) < 2:
        return f"the mask has {len(shape_of(found.mask))} dimensions, not queries and keys"
    return None


def _site(rewriter: Rewriter, node: fx.Node, found: _Attention) -> str:
    """The module whose projections feed an attention, or the node's name."""
    weights = []
    for operand in (found.query, found.key, found.value):
        base = strided(operand).base
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
