"""Rules of `Canonicalize` about dims and indices: none is negative, implied or out of range."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sparsify.passes.canonical_types import cast
from sparsify.passes.graph import Extent, arguments, aten, operand, same, shape_of
from sparsify.passes.iota import UNCHANGED, iota
from sparsify.rewriter import Rewriter


def _extent(rewriter: Rewriter, x: fx.Node, dim: int) -> int | fx.Node:
    size = shape_of(x)[dim]
    return size if isinstance(size, int) else rewriter.call(aten.sym_size.int, (x, dim))


def _minus(rewriter: Rewriter, x: fx.Node, dim: int, negative: int) -> int | fx.Node:
    """``size + negative`` as a number or a graph node."""
    size = _extent(rewriter, x, dim)
    return (
        size + negative if isinstance(size, int) else rewriter.call(operator.add, (size, negative))
    )


def positive_select(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``x.select(d, -1)``: TVM reads it before the start of the buffer, without a word."""
    if node.target != aten.select.int:
        return None
    x, dim, index = node.args
    if not isinstance(index, int) or (dim >= 0 and index >= 0):
        return None
    dim %= x.meta["val"].dim()
    if index < 0:
        index = _minus(rewriter, x, dim, index)
    if isinstance(index, int):
        return rewriter.call(aten.select.int, (x, dim, index))
    # The importer selects by a constant only, but slices by any extent.
    end = rewriter.call(operator.add, (index, 1))
    row = rewriter.call(aten.slice.Tensor, (x, dim, index, end))
    return rewriter.call(aten.squeeze.dims, (row, [dim]))


def positive_slice(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Negative dims, starts and ends count from the front; ends stay within the dim."""
    if node.target != aten.slice.Tensor:
        return None
    options = arguments(node)
    x, start, end = node.args[0], options["start"], options["end"]
    dim = options["dim"] % x.meta["val"].dim()
    size = shape_of(x)[dim]
    new_start = _bound(rewriter, x, dim, 0 if start is None else start)
    new_end = _bound(rewriter, x, dim, sys.maxsize if end is None else end)
    if isinstance(new_end, int) and new_end >= (size if isinstance(size, int) else sys.maxsize):
        new_end = size if isinstance(size, int) else sys.maxsize
    args = (x, dim, new_start, new_end, options["step"])
    if args == (x, options["dim"], start, end, options["step"]):
        return None
    return rewriter.call(aten.slice.Tensor, args)


def _bound(rewriter: Rewriter, x: fx.Node, dim: int, bound: Any) -> int | fx.Node:
    if isinstance(bound, fx.Node) or bound >= 0:
        return bound
    size: Extent = shape_of(x)[dim]
    if isinstance(size, int):
        return max(0, size + bound)
    start = _minus(rewriter, x, dim, bound)
    # x[-3:] of a shorter x starts at 0; only a known lower bound of the size excludes that.
    if statically_known_true(size + bound >= 0):
        return start
    return rewriter.call(torch.sym_max, (start, 0))


def index_leading(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``x[:, i]``: indexed dims are moved to the front, and the result's dims back."""
    if node.target != aten.index.Tensor:
        return None
    x, indices = node.args
    places = [d for d, index in enumerate(indices) if index is not None]
    if places == list(range(len(indices))) or any(_is_mask(indices[d]) for d in places):
        return None
    rest = [d for d in range(x.meta["val"].dim()) if d not in places]
    front = rewriter.call(aten.permute.default, (x, [*places, *rest]))
    taken = rewriter.call(aten.index.Tensor, (front, [indices[d] for d in places]))
    adjacent = places == list(range(places[0], places[-1] + 1))
    if not adjacent:
        return taken
    rank = taken.meta["val"].dim()
    block = rank - len(rest)
    before = places[0]
    order = [*range(block, block + before), *range(block), *range(block + before, rank)]
    return rewriter.call(aten.permute.default, (taken, order))


def positive_index(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Index tensors that may hold negative values count from the front first."""
    if node.target != aten.index.Tensor or None in node.args[1]:
        return None
    x, indices = node.args
    wrapped = []
    for dim, index in enumerate(indices):
        if _is_mask(index) or _is_non_negative(rewriter, index):
            wrapped.append(index)
            continue
        index = cast(rewriter, index, torch.int64)
        back = rewriter.call(aten.add.Tensor, (index, _extent(rewriter, x, dim)))
        below = rewriter.call(aten.lt.Scalar, (index, 0))
        wrapped.append(rewriter.call(aten.where.self, (below, back, index)))
    return rewriter.call(aten.index.Tensor, (x, wrapped)) if wrapped != list(indices) else None


def _is_non_negative(rewriter: Rewriter, index: fx.Node) -> bool:
    weight = rewriter.weight_of(index)
    if weight is not None:
        return bool((weight >= 0).all())
    ramp = iota(rewriter, index)
    if ramp is not None:
        return ramp.offset >= 0
    if index.target == aten.where.self:
        below, back, same_index = index.args
        return bool(
            below.target == aten.lt.Scalar
            and below.args == (same_index, 0)
            and back.target == aten.add.Tensor
            and back.args[0] is same_index
        )
    if index.target in (*UNCHANGED, aten.index.Tensor):
        return _is_non_negative(rewriter, index.args[0])
    return index.target in (aten.argmax.default, aten.argmin.default)


def _is_mask(index: fx.Node) -> bool:
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


def part_of_cat(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """slice(cat([x, y], d), d, 0, size of x) -> x"""
    if node.target != aten.slice.Tensor:
        return None
    options = arguments(node)
    joined = options["self"]
    if joined.target != aten.cat.default or options["step"] != 1:
        return None
    parts, dim = joined.args[0], arguments(joined)["dim"]
    rank = len(shape_of(joined))
    if dim % rank != options["dim"] % rank:
        return None
    sizes = [shape_of(part)[dim] if len(shape_of(part)) == rank else None for part in parts]
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        if not isinstance(size, int):
            return None
        if (options["start"] or 0, options["end"]) == (start, start + size):
            same_type = part.meta["val"].dtype == node.meta["val"].dtype
            return part if same_type else None
        start += size
    return None


def undone_unsqueeze(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """squeeze(unsqueeze(x, d), d) -> x"""
    if node.target not in (aten.squeeze.dim, aten.squeeze.dims):
        return None
    source, squeezed = operand(node), operand(node, 1)
    if source.target != aten.unsqueeze.default:
        return None
    dims = squeezed if isinstance(squeezed, list | tuple) else [squeezed]
    rank = len(shape_of(source))
    if [d % rank for d in dims] != [operand(source, 1) % rank]:
        return None
    return operand(source)


def cat_without_empties(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Drops legacy 1-D empty operands, resolves a negative dim, and promotes dtypes."""
    if node.target != aten.cat.default:
        return None
    parts = node.args[0]
    result = node.meta["val"]
    dim = arguments(node)["dim"] % result.dim()
    kept = [p for p in parts if not _is_empty(p) or p.meta["val"].dim() == result.dim() > 1]
    if not kept:
        return None
    typed = [
        p
        if p.meta["val"].dtype == result.dtype
        else rewriter.call(aten._to_copy.default, (p,), {"dtype": result.dtype})
        for p in kept
    ]
    if typed == list(parts) and arguments(node)["dim"] == dim:
        return None
    return rewriter.call(aten.cat.default, (typed, dim))


def _is_empty(node: fx.Node) -> bool:
    shape = shape_of(node)
    return len(shape) == 1 and same(shape[0], 0)


def static_squeeze(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Only dims that are 1 for every input are squeezed; a dynamic dim is kept by the export."""
    if node.target not in (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims):
        return None
    x = node.args[0]
    shape = shape_of(x)
    if node.target == aten.squeeze.default:
        wanted = list(range(len(shape)))
    else:
        given = node.args[1]
        wanted = [d % len(shape) for d in ([given] if isinstance(given, int) else given)]
    dims = [d for d in wanted if same(shape[d], 1)]
    if node.target == aten.squeeze.dims and list(node.args[1]) == dims:
        return None
    if not dims:
        return x
    return rewriter.call(aten.squeeze.dims, (x, dims))


def static_convolution_padding(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``padding="valid"`` or ``"same"`` in numbers, where it is the same on both sides."""
    convolutions = {
        aten.conv1d.padding: aten.conv1d.default,
        aten.conv2d.padding: aten.conv2d.default,
        aten.conv3d.padding: aten.conv3d.default,
    }
    if node.target not in convolutions:
        return None
    options = arguments(node)
    kernel = shape_of(options["weight"])[2:]
    if not all(isinstance(k, int) for k in kernel):
        return None
    dilation = [*options["dilation"]] * (len(kernel) if len(options["dilation"]) == 1 else 1)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if options["padding"] == "valid":
        total = [0] * len(kernel)
    if any(t % 2 for t in total):
        return None
    operands = (options["input"], options["weight"], options["bias"], options["stride"])
    padding = [t // 2 for t in total]
    return rewriter.call(
        convolutions[node.target], (*operands, padding, options["dilation"], options["groups"])
    )
