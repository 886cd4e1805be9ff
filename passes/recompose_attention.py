"""Attention that is spelled out by two products and a softmax."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sparsify.passes.extents import Extents
from sparsify.passes.graph import (
    COPIES,
    Extent,
    arguments,
    aten,
    is_tensor,
    past_copies,
    product,
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
_RESHAPES = (aten.reshape.default, aten.view.default)
_KNOWN = (
    *COPIES,
    *_RESHAPES,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.tanh.default,
    aten.where.self,
)
"""What may stand between the product of query and key and the softmax."""


@dataclass(frozen=True)
class Spelled:
    """Attention of ``[..., heads, length, head_dim]`` that is spelled out.

    Attributes:
        query, key: the key is transposed, ``[..., head_dim, length]``.
        shape: of the scores where the mask is added.
        softcap: scores ``s`` become ``softcap * tanh(s / softcap)``; 0: they stay.
    """

    query: fx.Node
    key: fx.Node
    scale: float
    mask: fx.Node | None = None
    shape: tuple[Extent, ...] = ()
    softcap: float = 0.0


@dataclass(frozen=True)
class Attended:
    """Its operands with four dimensions, ``[batch, heads, length, head_dim]``."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float | None
    softcap: float
    causal: bool = False


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
    return _with_heads(rewriter, scores, node, node.args[1])


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
    found = _with_heads(rewriter, scores, node, options["value"])
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


def _with_heads(
    rewriter: Rewriter, scores: Spelled, node: fx.Node, value: fx.Node
) -> Attended | None:
    """The operands with their leading dimensions as batch and heads."""
    query = scores.query
    rank = len(shape_of(query))
    if rank < 3 or rank > 5 or len(shape_of(value)) != rank or len(shape_of(scores.key)) != rank:
        return None
    if rank == 4:
        key, mask = _transposed(rewriter, scores.key), scores.mask
        return Attended(query, key, value, mask, scores.scale, scores.softcap)
    batch, heads = _leading(scores, node)
    if not isinstance(heads, int):
        return None
    mask = scores.mask
    if mask is not None:
        mask = _mask_of_heads(rewriter, mask, scores.shape, (batch, heads))
        if mask is None:
            return None
    key = rewriter.call(aten.transpose.int, (scores.key, rank - 2, rank - 1))
    if rank == 5:
        groups = shape_of(query)[:3]
        key, value = (_expanded(rewriter, x, groups) for x in (key, value))
    parts = [reshape(rewriter, x, (batch, heads, *shape_of(x)[-2:])) for x in (query, key, value)]
    return Attended(parts[0], parts[1], parts[2], mask, scores.scale, scores.softcap)


def _leading(scores: Spelled, node: fx.Node) -> tuple[Extent, Extent]:
    """Batch and heads of operands ``[batch * heads, l, d]`` or ``[batch, kv, group, l, d]``."""
    shape = shape_of(scores.query)
    if len(shape) == 5:
        return shape[0], product(shape[1:3])
    known = [scores.shape]
    known += [shape_of(n) for n in node.users if n.target in _RESHAPES]
    if scores.query.target in _RESHAPES:
        known.append(shape_of(scores.query.args[0]))
    for split in known:
        if len(split) >= 4 and same(product(split[:2]), shape[0]):
            return split[0], split[1]
    return shape[0], 1


def _mask_of_heads(
    rewriter: Rewriter, mask: fx.Node, scores: tuple[Extent, ...], leading: tuple[Extent, Extent]
) -> fx.Node | None:
    """A mask of scores with other leading dimensions, as one of ``[batch, heads, l, k]``."""
    shape = shape_of(mask)
    if len(shape) == 2 or (len(scores) == 4 and same_shape(scores[:2], leading)):
        return mask
    if all(same(extent, 1) for extent in shape[:-2]):
        return reshape(rewriter, mask, (1, 1, *shape[-2:]))
    if len(scores) == 5 and len(shape) == 5 and all(same(extent, 1) for extent in shape[1:3]):
        return reshape(rewriter, mask, (shape[0], 1, *shape[-2:]))
    if len(scores) == 3 and len(shape) == 3 and same(shape[0], product(leading)):
        return reshape(rewriter, mask, (*leading, *shape[-2:]))
    return None


def _expanded(rewriter: Rewriter, node: fx.Node, leading: tuple[Extent, ...]) -> fx.Node:
    shape = (*leading, *shape_of(node)[-2:])
    if same_shape(shape_of(node), shape):
        return node
    extents = Extents(rewriter)
    return rewriter.call(aten.expand.default, (node, [extents.node(extent) for extent in shape]))


def _transposed(rewriter: Rewriter, key: fx.Node) -> fx.Node:
    """Keys ``[batch, heads, head_dim, length]`` with the length before head_dim."""
    return _unmerged(key) or rewriter.call(aten.permute.default, (key, [0, 1, 3, 2]))


def _unmerged(key: fx.Node) -> fx.Node | None:
    """``reshape(permute(reshape(k, [b * h, l, d]), [0, 2, 1]), [b, h, d, l])`` -> k."""
    if key.target not in _RESHAPES:
        return None
    turned = past_copies(key.args[0])
    if turned.target != aten.permute.default or list(turned.args[1]) != [0, 2, 1]:
        return None
    merged = past_copies(turned.args[0])
    if merged.target not in _RESHAPES:
        return None
    source = merged.args[0]
    shape = shape_of(source)
    wanted = (*shape[:2], shape[3], shape[2]) if len(shape) == 4 else ()
    rows = same_shape(shape_of(merged)[1:], shape[2:])
    return source if rows and same_shape(shape_of(key), wanted) else None
