"""Attention that is spelled out by two products and a softmax."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sparsify.passes.graph import arguments, aten, is_tensor, past_copies, same_shape, shape_of
from sparsify.passes.recompose_activation import factors
from sparsify.rewriter import Rewriter

_ABSORBING = -3e38
"""A fill in float32 beside which a score is nothing, so that it may as well be added."""


@dataclass(frozen=True)
class _Scores:
    query: fx.Node
    key: fx.Node
    scale: float
    mask: fx.Node | None = None


def attention(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``softmax(q k^T * scale + mask) v`` of ``[batch, heads, length, head_dim]``."""
    if node.target != aten.matmul.default or len(shape_of(node)) != 4:
        return None
    weights = _past_guard(past_copies(node.args[0]))
    if weights.target != aten.softmax.int or arguments(weights)["dim"] not in (-1, 3):
        return None
    scores = _scores(rewriter, past_copies(weights.args[0]))
    if scores is None or node.meta["val"].dtype != torch.float32:
        return None
    key = _transposed(rewriter, scores.key)
    operands = (scores.query, key, node.args[1], scores.mask, 0.0, False)
    return rewriter.call(
        aten.scaled_dot_product_attention.default, operands, {"scale": scores.scale}
    )


def _past_guard(node: fx.Node) -> fx.Node:
    """``where(isnan(w), 0, w)`` -> w; fused attention gives zeros there of its own."""
    if node.target != aten.where.self:
        return node
    condition, zero, weights = map(past_copies, node.args)
    guarded = condition.target == aten.isnan.default and _number(zero) == 0
    return weights if guarded and past_copies(condition.args[0]) is weights else node


def _scores(rewriter: Rewriter, node: fx.Node) -> _Scores | None:
    """The parts of ``q k^T * scale + mask``, each of the last two optional."""
    if node.target == aten.matmul.default and len(shape_of(node)) == 4:
        query_scale, query = factors(past_copies(node.args[0]))
        key_scale, key = factors(past_copies(node.args[1]))
        if len(query) == len(key) == 1 and same_shape(shape_of(query[0]), shape_of(node.args[0])):
            return _Scores(query[0], key[0], query_scale * key_scale)
        return None
    if node.target == aten.add.Tensor and arguments(node)["alpha"] == 1:
        for scores, mask in (node.args[:2], node.args[1::-1]):
            if not is_tensor(scores) or not is_tensor(mask):
                continue
            found = _scores(rewriter, past_copies(scores))
            if found is not None and found.mask is None and _masks(mask, scores, node):
                return replace(found, mask=mask)
        return None
    if node.target == aten.where.self:
        return _filled(rewriter, node)
    scale, tensors = factors(node)
    if len(tensors) == 1 and tensors[0] is not node:
        found = _scores(rewriter, tensors[0])
        if found is not None and found.mask is None:
            return replace(found, scale=found.scale * scale)
    return None


def _filled(rewriter: Rewriter, node: fx.Node) -> _Scores | None:
    """``where(mask, scores, -inf)``, or with the largest negative number, or the other way."""
    condition, left, right = map(past_copies, node.args)
    for kept, fill, scores in ((True, _number(right), left), (False, _number(left), right)):
        if fill is None or fill > _ABSORBING or not isinstance(scores, fx.Node):
            continue
        found = _scores(rewriter, scores)
        if found is None or found.mask is not None or not _masks(condition, scores, node):
            continue
        zero, low = (rewriter.call(aten.scalar_tensor.default, (n,)) for n in (0.0, fill))
        sides = (condition, zero, low) if kept else (condition, low, zero)
        return replace(found, mask=rewriter.call(aten.where.self, sides))
    return None


def _masks(mask: fx.Node, scores: fx.Node, masked: fx.Node) -> bool:
    """Whether a mask spreads over the scores alone, and has queries and keys of its own."""
    return len(shape_of(mask)) >= 2 and same_shape(shape_of(masked), shape_of(scores))


def _number(node: Any) -> float | None:
    """What a tensor of one number that the graph makes holds."""
    if not isinstance(node, fx.Node):
        return float(node) if isinstance(node, int | float) else None
    if node.target == aten.scalar_tensor.default:
        return float(node.args[0])
    if node.target == aten.full.default and all(size == 1 for size in node.args[0]):
        return float(node.args[1])
    return None


def _transposed(rewriter: Rewriter, key: fx.Node) -> fx.Node:
    """Keys ``[batch, heads, head_dim, length]`` with the length before head_dim."""
    return _unmerged(key) or rewriter.call(aten.permute.default, (key, [0, 1, 3, 2]))


def _unmerged(key: fx.Node) -> fx.Node | None:
    """``reshape(permute(reshape(k, [b * h, l, d]), [0, 2, 1]), [b, h, d, l])`` -> k."""
    reshapes = (aten.reshape.default, aten.view.default)
    if key.target not in reshapes:
        return None
    turned = past_copies(key.args[0])
    if turned.target != aten.permute.default or list(turned.args[1]) != [0, 2, 1]:
        return None
    merged = past_copies(turned.args[0])
    if merged.target not in reshapes:
        return None
    source = merged.args[0]
    shape = shape_of(source)
    wanted = (*shape[:2], shape[3], shape[2]) if len(shape) == 4 else ()
    rows = same_shape(shape_of(merged)[1:], shape[2:])
    return source if rows and same_shape(shape_of(key), wanted) else None
