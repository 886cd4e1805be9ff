"""Reductions to the largest, the smallest, where that is, and the product.

The largest of nothing, or of minus infinity alone, which rows of masks are, is minus infinity; one
NaN makes it NaN. TVM's reductions begin with the largest finite number, and drop NaN: the maximum
of such a row is -3.4e38, and its position -1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx
from tvm import relax, te, tirx

from sparsify.codegen.operators.arguments import arguments_of, shape_of
from sparsify.codegen.operators.extremes import is_float, larger, smaller

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


@dataclass(frozen=True)
class Extreme:
    """The largest of numbers, or the smallest."""

    largest: bool

    def start(self, dtype: Any) -> Any:
        """What no number is further out than."""
        if "float" in str(dtype):
            return tirx.const(-math.inf if self.largest else math.inf, dtype)
        return tirx.min_value(dtype) if self.largest else tirx.max_value(dtype)

    def of(self, a: Any, b: Any) -> Any:
        return larger(a, b) if self.largest else smaller(a, b)

    def wins(self, a: tuple[Any, Any], b: tuple[Any, Any]) -> Any:
        """Whether a position and its value come before others: equal ones in their order."""
        (i, x), (j, y) = a, b
        further, equal = (x > y if self.largest else x < y), x == y
        if is_float(x):
            further = tirx.any(further, tirx.all(tirx.isnan(x), tirx.Not(tirx.isnan(y))))
            equal = tirx.any(equal, tirx.all(tirx.isnan(x), tirx.isnan(y)))
        return tirx.any(further, tirx.all(equal, i < j))


LARGEST, SMALLEST = Extreme(True), Extreme(False)


def convert_extreme(node: fx.Node, lowering: Lowering) -> Any:
    """``amax``, ``amin``, and ``max`` and ``min`` of all elements."""
    a = arguments_of(node)
    return _reduced(
        lowering, lowering.tensor(a["self"]), _extreme(node), a.get("dim"), a.get("keepdim", False)
    )


def convert_extreme_and_position(node: fx.Node, lowering: Lowering) -> Any:
    """``max`` and ``min`` along a dim: a tuple of values and positions."""
    a, extreme = arguments_of(node), _extreme(node)
    x = lowering.tensor(a["self"])
    values = _reduced(lowering, x, extreme, a["dim"], a["keepdim"])
    return lowering.block_builder.emit(
        relax.Tuple([values, _position(lowering, x, extreme, a["dim"], a["keepdim"])])
    )


def convert_position(node: fx.Node, lowering: Lowering) -> Any:
    """``argmax`` and ``argmin``, along a dim or of all elements."""
    a = arguments_of(node)
    x, dim, keepdim = lowering.tensor(a["self"]), a["dim"], a["keepdim"]
    if dim is None:
        x, dim, keepdim = lowering.reshape(x, (-1,)), 0, False
    found = _position(lowering, x, _extreme(node), dim, keepdim)
    return lowering.reshape(found, lowering.type_of(node.meta["val"]).shape.values)


def convert_product(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    x, dtype = lowering.tensor(a["self"]), str(lowering.type_of(node.meta["val"]).dtype)
    if str(x.ty.dtype) != dtype:  # a product of integers is int64
        x = lowering.block_builder.emit(relax.op.astype(x, dtype))
    return lowering.block_builder.emit(relax.op.prod(x, [a["dim"]], a["keepdim"]))


def _extreme(node: fx.Node) -> Extreme:
    return LARGEST if "max" in node.target._schema.name else SMALLEST


def _reduced(lowering: Lowering, x: Any, extreme: Extreme, dims: Any, keepdim: bool) -> Any:
    """Over one dim, some, or with none given all of them."""
    rank = len(shape_of(x))
    chosen = [dims] if isinstance(dims, int) else list(dims or range(rank))
    chosen = sorted(dim % rank for dim in chosen) if rank else []
    if not chosen:
        return x

    def compute(x: te.Tensor) -> te.Tensor:
        reduce = value_reducer(extreme)
        axes = {dim: te.reduce_axis((0, x.shape[dim])) for dim in chosen}
        return te.compute(
            _without(x.shape, chosen, keepdim),
            lambda *i: reduce(x(*_with(i, axes, rank, keepdim)), axis=list(axes.values())),
            "extreme",
        )

    return lowering.block_builder.emit_te(compute, x, primfunc_name_hint="extreme")


def _position(lowering: Lowering, x: Any, extreme: Extreme, dim: int, keepdim: bool) -> Any:
    rank = len(shape_of(x))
    if not rank:
        return lowering.block_builder.emit(relax.op.zeros((), "int64"))
    dim %= rank

    def compute(x: te.Tensor) -> te.Tensor:
        axis = te.reduce_axis((0, x.shape[dim]))
        reduce = te.comm_reducer(
            lambda a, b: [
                tirx.Select(extreme.wins(a, b), one, other) for one, other in zip(a, b, strict=True)
            ],
            lambda index, value: [tirx.max_value(index), extreme.start(value)],
        )
        shape = _without(x.shape, [dim], keepdim)
        found, _ = te.compute(
            shape,
            lambda *i: reduce(
                (axis.var.astype("int64"), x(*_with(i, {dim: axis}, rank, keepdim))), axis=axis
            ),
            "position",
        )
        return te.compute(shape, lambda *i: found(*i), "positions")

    return lowering.block_builder.emit_te(compute, x, primfunc_name_hint="position")


def value_reducer(extreme: Extreme) -> Callable[..., Any]:
    return te.comm_reducer(lambda a, b: extreme.of(a, b), lambda dtype: extreme.start(dtype))


def _without(shape: Sequence[Any], dims: Sequence[int], keepdim: bool) -> list[Any]:
    """A shape less what is reduced."""
    one = tirx.IntImm("int64", 1)
    kept = [one if i in dims else size for i, size in enumerate(shape)]
    return kept if keepdim else [size for i, size in enumerate(shape) if i not in dims]


def _with(indices: Sequence[Any], axes: Any, rank: int, keepdim: bool) -> list[Any]:
    """Indices of a result, and of what is reduced, as those of the source."""
    if keepdim:
        return [axes.get(i, index) for i, index in enumerate(indices)]
    rest = iter(indices)
    return [axes[i] if i in axes else next(rest) for i in range(rank)]
