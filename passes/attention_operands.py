"""The operands of attention that is spelled out, as ``[batch, heads, length, head_dim]``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sparsify.passes.extents import Extents
from sparsify.passes.graph import Extent, aten, past_copies, product, same, same_shape, shape_of
from sparsify.passes.heads import reshape
from sparsify.rewriter import Rewriter

RESHAPES = (aten.reshape.default, aten.view.default)


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


def with_heads(
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
    known += [shape_of(n) for n in node.users if n.target in RESHAPES]
    if scores.query.target in RESHAPES:
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
    if key.target not in RESHAPES:
        return None
    turned = past_copies(key.args[0])
    if turned.target != aten.permute.default or list(turned.args[1]) != [0, 2, 1]:
        return None
    merged = past_copies(turned.args[0])
    if merged.target not in RESHAPES:
        return None
    source = merged.args[0]
    shape = shape_of(source)
    wanted = (*shape[:2], shape[3], shape[2]) if len(shape) == 4 else ()
    rows = same_shape(shape_of(merged)[1:], shape[2:])
    return source if rows and same_shape(shape_of(key), wanted) else None
