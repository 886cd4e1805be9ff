"""Tensors as strided views of a row-major base, through any spelling of reshape and permute.

Torch spells the split of ``[b, s, heads * d]`` into heads as view, unflatten, permute, transpose,
select, chunk and copies in many orders. `strided` composes them into one mapping.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from sparsify.passes.graph import (
    Extent,
    arguments,
    aten,
    hint,
    is_tensor,
    operand,
    product,
    same,
    same_shape,
    shape_of,
)

Atom = tuple[Extent, Extent]
"""An extent and its stride, in elements of the row-major base. A stride of 0 repeats."""


@dataclass(frozen=True)
class Strided:
    """``base``, read at ``offset`` with the atoms of each dimension; extents of 1 have no atom."""

    base: fx.Node
    offset: Extent
    dims: tuple[tuple[Atom, ...], ...]

    @property
    def is_whole(self) -> bool:
        """Whether this is the base itself in its own order, up to the shape."""
        atoms = _merge([atom for dim in self.dims for atom in dim])
        numel = product(shape_of(self.base))
        if not same(self.offset, 0):
            return False
        if not atoms:
            return same(numel, 1)
        return len(atoms) == 1 and same(atoms[0][0], numel) and same(atoms[0][1], 1)


def strided(node: fx.Node) -> Strided:
    """How ``node`` reads the farthest ancestor that views alone separate it from."""
    handler = _HANDLERS.get(node.target)
    if handler is not None and is_tensor(node):
        view = handler(node)
        if view is not None:
            return view
    shape = shape_of(node)
    strides = [product(shape[i + 1 :]) for i in range(len(shape))]
    atoms = zip(shape, strides, strict=True)
    return Strided(node, 0, tuple(() if same(e, 1) else ((e, s),) for e, s in atoms))


def same_view(left: Strided, right: Strided) -> bool:
    """Whether both read the same elements of the same base for every input."""
    if left.base is not right.base or len(left.dims) != len(right.dims):
        return False
    return same(left.offset, right.offset) and all(
        len(a) == len(b)
        and all(same(x[0], y[0]) and same(x[1], y[1]) for x, y in zip(a, b, strict=True))
        for a, b in zip(left.dims, right.dims, strict=True)
    )


def is_view(node: fx.Node) -> bool:
    return node.target in _HANDLERS and is_tensor(node)


def let_views_copy(node: fx.Node, source: fx.Node) -> None:
    """Before ``source`` takes the place of ``node``: views that need its strides may copy now."""
    if same_shape(source.meta["val"].stride(), node.meta["val"].stride()):
        return
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if is_view(user):
            pending.extend(user.users)
            if user.target == aten.view.default:
                user.target = aten.reshape.default


def _identity(node: fx.Node) -> Strided:
    return strided(operand(node))


def _view(node: fx.Node) -> Strided | None:
    source = strided(operand(node))
    dims = _regroup([atom for dim in source.dims for atom in dim], shape_of(node))
    return None if dims is None else replace(source, dims=dims)


def _permute(node: fx.Node) -> Strided:
    source = strided(operand(node))
    return replace(source, dims=tuple(source.dims[d] for d in arguments(node)["dims"]))


def _transpose(node: fx.Node) -> Strided:
    source = strided(operand(node))
    dims = list(source.dims)
    a, b = arguments(node)["dim0"], arguments(node)["dim1"]
    dims[a], dims[b] = dims[b], dims[a]
    return replace(source, dims=tuple(dims))


def _expand(node: fx.Node) -> Strided:
    source = strided(operand(node))
    shape = shape_of(node)
    dims = [()] * (len(shape) - len(source.dims)) + list(source.dims)
    repeated = [
        ((extent, 0),) if not dim and not same(extent, 1) else dim
        for dim, extent in zip(dims, shape, strict=True)
    ]
    return replace(source, dims=tuple(repeated))


def _slice(node: fx.Node) -> Strided | None:
    options = arguments(node)
    before, after = shape_of(operand(node)), shape_of(node)
    dim = options["dim"]
    if options["step"] != 1:
        return None
    start = options["start"] or 0
    if same(before[dim], after[dim]):
        return strided(operand(node))
    if not isinstance(start, int):
        return None
    return _narrow(operand(node), dim, start, after[dim])


def _select(node: fx.Node) -> Strided | None:
    options = arguments(node)
    return _pick(operand(node), options["dim"], options["index"])


def _piece(node: fx.Node) -> Strided | None:
    """One piece of a split or unbind."""
    parent, index = operand(node), operand(node, 1)
    if parent.target == aten.unbind.int:
        return _pick(operand(parent), arguments(parent)["dim"], index)
    if parent.target not in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
        return None
    dim = arguments(parent)["dim"]
    sizes = [piece.shape[dim] for piece in parent.meta["val"]]
    return _narrow(operand(parent), dim, sum(sizes[:index]), sizes[index])


def _narrow(node: fx.Node, dim: int, start: Extent, extent: Extent) -> Strided | None:
    source = strided(node)
    if len(source.dims[dim]) != 1:
        return None
    whole, stride = source.dims[dim][0]
    if isinstance(start, int) and start < 0:
        start = whole + start
    dims = list(source.dims)
    dims[dim] = () if same(extent, 1) else ((extent, stride),)
    return replace(source, offset=source.offset + start * stride, dims=tuple(dims))


def _pick(node: fx.Node, dim: int, index: Any) -> Strided | None:
    narrowed = _narrow(node, dim, index, 1) if isinstance(index, int) else None
    if narrowed is None:
        return None
    dims = list(narrowed.dims)
    del dims[dim]
    return replace(narrowed, dims=tuple(dims))


def _regroup(atoms: list[Atom], shape: tuple[Extent, ...]) -> tuple[tuple[Atom, ...], ...] | None:
    """Deals the atoms out to new dimensions, splitting where one ends inside an atom."""
    pending = list(atoms)
    dims: list[tuple[Atom, ...]] = []
    for size in shape:
        taken: list[Atom] = []
        filled: Extent = 1
        while not same(filled, size):
            if not pending:
                return None
            extent, stride = pending.pop(0)
            if same(filled * extent, size) or hint(filled * extent) < hint(size):
                taken.append((extent, stride))
                filled = filled * extent
                continue
            outer = size // filled
            inner = extent // outer
            if not same(outer * inner, extent):
                return None
            taken.append((outer, stride * inner))
            pending.insert(0, (inner, stride))
            filled = filled * outer
            if not same(filled, size):
                return None
        dims.append(tuple(_merge(taken)))
    return None if pending else tuple(dims)


def _merge(atoms: list[Atom]) -> list[Atom]:
    """Joins neighbours that step through the base as one."""
    merged: list[Atom] = []
    for extent, stride in atoms:
        if merged and same(merged[-1][1], extent * stride):
            merged[-1] = (merged[-1][0] * extent, stride)
        else:
            merged.append((extent, stride))
    return merged


_HANDLERS: dict[Any, Callable[[fx.Node], Strided | None]] = {
    aten.clone.default: _identity,
    aten.contiguous.default: _identity,
    aten.alias.default: _identity,
    aten.detach.default: _identity,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.unflatten.int: _view,
    aten.flatten.using_ints: _view,
    aten.unsqueeze.default: _view,
    aten.squeeze.dim: _view,
    aten.squeeze.dims: _view,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    operator.getitem: _piece,
}
