"""Attention that is spelled out by two products and a softmax."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sparsify.passes.attention_operands import RESHAPES, Attended, Spelled, with_heads
from sparsify.passes.graph import (
    COPIES,
    arguments,
    aten,
    is_tensor,
    past_copies,
    same,
    same_shape,
    shape_of,
)
from sparsify.passes.heads import reshape
from sparsify.passes.mask_structure import ABSORBING
from sparsify.passes.recompose_activation import factors
from sparsify.passes.strided import strided
from sparsify.rewriter import Rewriter

PRODUCTS = (aten.matmul.default, aten.bmm.default)
_KNOWN = (
    *COPIES,
    *RESHAPES,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.tanh.default,
    aten.where.self,
)
"""What may stand between the product of query and key and the softmax."""


def attention(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``softmax(q k^T * scale + mask) v``, and ``sdpa``, of any number of batch dimensions."""
    found = _grouped(rewriter, node) or read(rewriter, node, capped=False)
    if found is None:
        return None
    operands = (found.query, found.key, found.value, found.mask, 0.0, found.causal)
    result = rewriter.call(
        aten.scaled_dot_product_attention.default, operands, {"scale": found.scale}
    )
    return reshape(rewriter, result, shape_of(node))


def read(rewriter: Rewriter, node: fx.Node, capped: bool) -> Attended | None:
    """The operands of the attention whose result a product is; with a soft cap or without one."""
    if node.target not in PRODUCTS or node.meta["val"].dtype != torch.float32:
        return None
    weights = _past_guard(_past_regrouping(node.args[0]))
    if weights.target != aten.softmax.int:
        return None
    if arguments(weights)["dim"] not in (-1, len(shape_of(weights)) - 1):
        return None
    scores = _scores(rewriter, past_copies(weights.args[0]))
    if scores is None or bool(scores.softcap) != capped:
        return None
    return with_heads(rewriter, scores, node, node.args[1])


def _grouped(rewriter: Rewriter, node: fx.Node) -> Attended | None:
    """``sdpa`` of operands that have other than four dimensions."""
    if node.target != aten.scaled_dot_product_attention.default or len(shape_of(node)) == 4:
        return None
    options = arguments(node)
    if options["dropout_p"] != 0 or len(shape_of(options["key"])) < 2:
        return None
    key = rewriter.call(aten.transpose.int, (options["key"], -2, -1))
    mask = options["attn_mask"]
    scale = options["scale"] or float(shape_of(options["query"])[-1]) ** -0.5
    shape = (*shape_of(node)[:-1], shape_of(key)[-1])
    scores = Spelled(options["query"], key, scale, mask, shape if mask is not None else ())
    found = with_heads(rewriter, scores, node, options["value"])
    return None if found is None else replace(found, causal=options["is_causal"])


def near_miss(node: fx.Node) -> str | None:
    """Why a softmax that stands between two products is no attention that can be read."""
    after = [user for user in node.users if is_tensor(user)]
    while after and after[0].target not in PRODUCTS:
        after = [u for u in after[0].users if is_tensor(u)] if len(after) == 1 else []
    shape = shape_of(node)
    before = past_copies(node.args[0])
    while after and before.target not in PRODUCTS:
        operands = [a for a in before.all_input_nodes if is_tensor(a)]
        if not operands:
            return None
        if len(shape_of(before)) < 2 or not same(shape_of(before)[-1], shape[-1]):
            return None
        if before.target not in _KNOWN:
            return (
                f"{before.target} stands between the product of query and key and the softmax, "
                "which attention as one operator cannot express"
            )
        before = past_copies(max(operands, key=lambda n: len(shape_of(n))))
    if not after or before.target not in PRODUCTS:
        return None
    return (
        f"scores {list(shape)} of {before.target} are scaled, masked or split into heads in a way "
        "that is not understood"
    )


def _past_guard(node: fx.Node) -> fx.Node:
    """``where(isnan(w), 0, w)`` -> w; fused attention gives zeros there of its own."""
    if node.target != aten.where.self:
        return node
    condition, zero, weights = map(past_copies, node.args)
    guarded = condition.target == aten.isnan.default and _number(zero) == 0
    return weights if guarded and past_copies(condition.args[0]) is weights else node


def _scores(rewriter: Rewriter, node: fx.Node) -> Spelled | None:
    """The parts of ``cap(q k^T * scale) + mask``, all but the product optional."""
    if node.target in PRODUCTS:
        query_scale, query = factors(past_copies(node.args[0]))
        key_scale, key = factors(past_copies(node.args[1]))
        if len(query) == len(key) == 1 and same_shape(shape_of(query[0]), shape_of(node.args[0])):
            return Spelled(query[0], key[0], query_scale * key_scale)
        return None
    if node.target == aten.add.Tensor and arguments(node)["alpha"] == 1:
        for scores, mask in (node.args[:2], node.args[1::-1]):
            if not is_tensor(scores) or not is_tensor(mask):
                continue
            found = _scores(rewriter, past_copies(scores))
            if found is not None and found.mask is None and _masks(mask, scores, node):
                return replace(found, mask=_with_queries(rewriter, mask), shape=shape_of(node))
        return None
    if node.target == aten.where.self:
        return _filled(rewriter, node)
    source = _past_regrouping(node)
    if source is not node:
        return _scores(rewriter, source)
    scale, tensors = factors(node)
    if len(tensors) != 1:
        return None
    if tensors[0].target == aten.tanh.default and scale > 0:
        found = _scores(rewriter, past_copies(tensors[0].args[0]))
        if found is not None and found.mask is None and not found.softcap:
            return replace(found, scale=found.scale * scale, softcap=scale)
    elif tensors[0] is not node:
        found = _scores(rewriter, tensors[0])
        if found is not None and found.mask is None and not found.softcap:
            return replace(found, scale=found.scale * scale)
    return None


def _filled(rewriter: Rewriter, node: fx.Node) -> Spelled | None:
    """``where(mask, scores, -inf)``, or with the largest negative number, or the other way."""
    condition, left, right = map(past_copies, node.args)
    for kept, fill, scores in ((True, _number(right), left), (False, _number(left), right)):
        if fill is None or fill > ABSORBING or not isinstance(scores, fx.Node):
            continue
        found = _scores(rewriter, scores)
        if found is None or found.mask is not None or not _masks(condition, scores, node):
            continue
        zero, low = (rewriter.call(aten.scalar_tensor.default, (n,)) for n in (0.0, fill))
        sides = (condition, zero, low) if kept else (condition, low, zero)
        mask = rewriter.call(aten.where.self, sides)
        return replace(found, mask=_with_queries(rewriter, mask), shape=shape_of(node))
    return None


def _masks(mask: fx.Node, scores: fx.Node, masked: fx.Node) -> bool:
    """Whether a mask that is no number spreads over the scores alone."""
    return len(shape_of(mask)) >= 1 and same_shape(shape_of(masked), shape_of(scores))


def _with_queries(rewriter: Rewriter, mask: fx.Node) -> fx.Node:
    return mask if len(shape_of(mask)) > 1 else rewriter.call(aten.unsqueeze.default, (mask, 0))


def _number(node: Any) -> float | None:
    """What a tensor of one number that the graph makes holds."""
    if not isinstance(node, fx.Node):
        return float(node) if isinstance(node, int | float) else None
    if node.target == aten.scalar_tensor.default:
        return float(node.args[0])
    if node.target == aten.full.default and all(size == 1 for size in node.args[0]):
        return float(node.args[1])
    return None


def _past_regrouping(node: Any) -> fx.Node:
    """What a node is but for its leading dimensions: ``[b * h, l, k]`` -> ``[b, h, l, k]``."""
    view = strided(node)
    regrouped = view.is_whole and same_shape(shape_of(view.base)[-2:], shape_of(node)[-2:])
    return view.base if regrouped else past_copies(node)
