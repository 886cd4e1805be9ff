"""Attention heads as cuts of row-major activations ``[batch, length, features]``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from sparsify.passes.extents import Extents
from sparsify.passes.graph import Extent, aten, past_copies, product, same, same_shape, shape_of
from sparsify.passes.strided import Strided, is_view, strided
from sparsify.rewriter import Rewriter

HEADS_FIRST = 1
"""The axis of the heads in ``[b, heads, length, head_dim]``."""
TOKENS_FIRST = 2
"""The axis of the heads in ``[b, length, heads, head_dim]``."""


@dataclass(frozen=True)
class Heads:
    """``count`` heads of a row-major tensor ``[b, length, features]``, from ``offset`` on."""

    base: fx.Node
    shape: tuple[Extent, Extent, int]
    count: int
    offset: int

    def rows(self, rewriter: Rewriter) -> fx.Node:
        return reshape(rewriter, self.base, self.shape)


def heads_of(operand: fx.Node, axis: int = HEADS_FIRST) -> Heads | None:
    """How an operand with its heads on ``axis`` is cut from row-major rows, None when it is not."""
    return _cut(_heads_first(strided(operand), axis), _order(shape_of(operand), axis))


def features_of(operand: fx.Node) -> Heads | None:
    """How ``[b, length, features]`` is cut from row-major rows, as one wide head."""
    view = strided(operand)
    if len(view.dims) != 3:
        return None
    over_batch, over_length, inner = view.dims
    batch, length, features = shape_of(operand)
    wide = replace(view, dims=(over_batch, (), over_length, inner))
    return _cut(wide, (batch, 1, length, features))


def _cut(view: Strided, shape: tuple[Extent, ...]) -> Heads | None:
    """The heads that a view with dims ``[b, heads, length, head_dim]`` is."""
    batch, heads, length, head_dim = shape
    over_batch, over_heads, over_length, inner = view.dims
    if inner != (((head_dim, 1),) if head_dim != 1 else ()):
        return None
    if heads == 1 or not over_heads or same(over_heads[0][1], 0):
        count = 1
    elif same(over_heads[0][1], head_dim) and isinstance(over_heads[0][0], int):
        count = over_heads[0][0]
    else:
        return None
    if any(not same(stride, 0) for _, stride in over_heads[1:]):
        return None
    numel = product(shape_of(view.base))
    if over_length:
        features = over_length[0][1]
    elif over_batch:
        features = over_batch[0][1]
    else:
        features = numel
    if not isinstance(features, int) or not isinstance(view.offset, int):
        return None
    whole = (
        len(over_length) <= 1
        and over_batch in ((), ((batch, over_batch[0][1]),) if over_batch else ())
        and (not over_batch or same(over_batch[0][1], length * features))
        and same(numel, batch * length * features)
    )
    if not whole or view.offset < 0 or view.offset + count * head_dim > features:
        return None
    return Heads(view.base, (batch, length, features), count, view.offset)


def as_rows(rewriter: Rewriter, operand: fx.Node, axis: int = HEADS_FIRST) -> fx.Node:
    """``[b, heads, length, head_dim]`` -> ``[b, length, heads * head_dim]`` by a transposition."""
    batch, heads, length, head_dim = _order(shape_of(operand), axis)
    rows = past_copies(operand)
    if axis == HEADS_FIRST:
        rows = rewriter.call(aten.permute.default, (rows, [0, 2, 1, 3]))
    return reshape(rewriter, rows, (batch, length, heads * head_dim))


def reshape(rewriter: Rewriter, node: fx.Node, shape: tuple[Extent, ...]) -> fx.Node:
    if same_shape(shape_of(node), shape):
        return node
    extents = Extents(rewriter)
    sizes = [extents.node(extent) for extent in shape]
    return rewriter.call(aten.reshape.default, (node, sizes))


def replace_by_rows(
    rewriter: Rewriter, node: fx.Node, rows: fx.Node, axis: int = HEADS_FIRST
) -> None:
    """Sends the users of ``[b, heads, length, head_dim]`` to the row-major result.

    A user that only undoes the split becomes the result itself.
    """
    batch, heads, length, head_dim = _order(shape_of(node), axis)
    split = reshape(rewriter, rows, (batch, length, heads, head_dim))
    turned = split
    if axis == HEADS_FIRST:
        turned = rewriter.call(aten.permute.default, (split, [0, 2, 1, 3]))
    rewriter.replace(node, turned)
    pending = list(turned.users)
    while pending:
        user = pending.pop()
        if not is_view(user):
            continue
        pending.extend(user.users)
        view = strided(user)
        if view.base is rows and view.is_whole:
            with rewriter.graph.inserting_before(user):
                rewriter.replace(user, reshape(rewriter, rows, shape_of(user)))
        elif user.target == aten.view.default:
            # Strides differ from those of the original; a view may have to copy now.
            user.target = aten.reshape.default


def _order(shape: tuple[Extent, ...], axis: int) -> tuple[Extent, ...]:
    return (shape[0], shape[axis], shape[3 - axis], shape[3])


def _heads_first(view: Strided, axis: int) -> Strided:
    dims = view.dims
    return replace(view, dims=(dims[0], dims[axis], dims[3 - axis], dims[3]))
