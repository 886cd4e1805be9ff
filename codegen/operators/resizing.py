"""Pictures of another size, static or not, read where PyTorch reads them.

TVM's importer takes no sizes that are known at run time alone, and its nearest neighbours are those
of the middles of pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx
from tvm import te, tirx

from sparsify.codegen.operators.arguments import arguments_of

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def convert_nearest(node: fx.Node, lowering: Lowering) -> Any:
    """The element at or before each place; with a whole factor, element ``i // factor``."""
    return _convert(node, lowering, lambda x, places: x(*(place.before() for place in places)))


def convert_bilinear(node: fx.Node, lowering: Lowering) -> Any:
    """The elements before and after each place, by their distances, down and across."""

    def between(x: Callable[..., Any], places: list[_Place]) -> Any:
        if not places:
            return x()
        first, *rest = places
        start, end, share = first.neighbours()
        above = between(lambda *i: x(start, *i), rest)
        below = between(lambda *i: x(end, *i), rest)
        return above * (tirx.const(1, share.ty.dtype) - share) + below * share

    return _convert(node, lowering, between)


def _convert(node: fx.Node, lowering: Lowering, read: Callable[..., Any]) -> Any:
    a, picture = arguments_of(node), node.args[0]
    source, result = picture.meta["val"].shape[2:], node.meta["val"].shape[2:]
    x, shape = lowering.tensor(picture), lowering.type_of(node.meta["val"]).shape.values
    scales = a.get("scale_factors") or (a.get("scales_h"), a.get("scales_w"))
    corners, dtype = bool(a.get("align_corners")), str(x.ty.dtype)
    axes = [
        _Axis(
            lowering.extent(before),
            lowering.extent(after),
            corners,
            scale,
            _whole(after, before),
            dtype if "float" in dtype else "float32",
        )
        for before, after, scale in zip(source, result, scales, strict=True)
    ]

    def compute(x: te.Tensor) -> te.Tensor:
        def at(*indices: Any) -> Any:
            n, c, *spatial = indices
            places = [_Place(axis, i) for axis, i in zip(axes, spatial, strict=True)]
            return read(lambda *i: x(n, c, *i), places)

        return te.compute(list(shape), at, "resize")

    return lowering.block_builder.emit_te(compute, x, primfunc_name_hint="resize")


def _whole(after: int | torch.SymInt, before: int | torch.SymInt) -> int | None:
    """How often each element is repeated, if it is known to be a whole number of times."""
    expressions = [n.node.expr if isinstance(n, torch.SymInt) else n for n in (after, before)]
    ratio = sympy.cancel(sympy.sympify(expressions[0]) / expressions[1])
    return int(ratio) if ratio.is_Integer else None


@dataclass(frozen=True)
class _Axis:
    """A dim that changes its size.

    Attributes:
        corners: whether the first and last elements keep their places.
        scale: the factor that a caller gave instead of sizes; the sizes' own is its rounding.
        whole: how often each element is repeated, if a whole number of times.
        dtype: of places.
    """

    before: Any
    after: Any
    corners: bool
    scale: float | None
    whole: int | None
    dtype: str

    def step(self) -> Any:
        """How far apart, in elements of the source, neighbours of the result are."""
        if self.corners:
            gaps = tirx.max(self.after - 1, tirx.IntImm("int64", 1))
            return (self.before - 1).astype(self.dtype) / gaps.astype(self.dtype)
        if self.scale is not None:
            return tirx.const(1 / self.scale, self.dtype)
        return self.before.astype(self.dtype) / self.after.astype(self.dtype)


@dataclass(frozen=True)
class _Place:
    """Where element ``index`` of the result is read."""

    axis: _Axis
    index: Any

    def before(self) -> Any:
        axis = self.axis
        if axis.whole is not None:
            return tirx.floordiv(self.index, axis.whole)
        place = tirx.floor(self.index.astype(axis.dtype) * axis.step())
        return tirx.min(place.astype("int64"), axis.before - 1)

    def neighbours(self) -> tuple[Any, Any, Any]:
        """The elements around it, and the share of the second."""
        axis = self.axis
        place, half = self.index.astype(axis.dtype), tirx.const(0.5, axis.dtype)
        if axis.corners:
            place = place * axis.step()
        else:
            place = tirx.max((place + half) * axis.step() - half, tirx.const(0, axis.dtype))
        start = tirx.min(tirx.floor(place).astype("int64"), axis.before - 1)
        share = tirx.min(place - start.astype(axis.dtype), tirx.const(1, axis.dtype))
        return start, tirx.min(start + 1, axis.before - 1), share
