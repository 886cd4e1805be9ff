"""Sorting and the k largest, in PyTorch's order: NaN is larger than all, and equals itself.

TVM sorts by a comparison that NaN fails whichever way it is asked, so that rows with one come out
in no order. What is sorted instead are integers in the order of the numbers:

    -inf < -1.0 < -0.0 = 0.0 < 1.0 < inf < nan    ->    bits, those of negative numbers flipped
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx
from tvm import relax, tirx

from sparsify.codegen.operators.arguments import arguments_of, shape_of
from sparsify.codegen.operators.extremes import is_float
from sparsify.codegen.operators.pointwise import each

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def convert_sort(node: fx.Node, lowering: Lowering) -> Any:
    """A tuple of values and positions; equal ones keep their order."""
    a = arguments_of(node)
    x = lowering.tensor(a["self"])
    return _taken(lowering, x, _order(lowering, x, a["dim"], a["descending"]), a["dim"])


def convert_argsort(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    return _order(lowering, lowering.tensor(a["self"]), a["dim"], a["descending"])


def convert_topk(node: fx.Node, lowering: Lowering) -> Any:
    """A tuple of values and positions, in order, which is one of those that PyTorch may choose."""
    a = arguments_of(node)
    x = lowering.tensor(a["self"])
    if not shape_of(x):
        return _taken(lowering, x, _order(lowering, x, a["dim"], a["largest"]), a["dim"])
    positions = lowering.block_builder.emit(
        relax.op.topk(_keys(lowering, x), a["k"], a["dim"], "indices", a["largest"], "int64")
    )
    return _taken(lowering, x, positions, a["dim"])


def _order(lowering: Lowering, x: Any, dim: int, descending: bool) -> Any:
    if not shape_of(x):
        return lowering.block_builder.emit(relax.op.zeros((), "int64"))
    return lowering.block_builder.emit(
        relax.op.argsort(_keys(lowering, x), dim, descending, "int64")
    )


def _taken(lowering: Lowering, x: Any, positions: Any, dim: int) -> Any:
    values = x
    if shape_of(x):
        axis = dim % len(shape_of(x))
        values = lowering.block_builder.emit(relax.op.gather_elements(x, positions, axis))
    return lowering.block_builder.emit(relax.Tuple([values, positions]))


def _keys(lowering: Lowering, x: Any) -> Any:
    """int32 or int64 in the order of a tensor's numbers."""
    return each(lowering, x, _key, "keys")


def _key(x: Any) -> Any:
    dtype = str(x.ty.dtype)
    key = "int64" if dtype.endswith("64") else "int32"
    if not is_float(x):
        return x.astype(key)
    bits = tirx.reinterpret(key, x)
    largest = tirx.max_value(key)
    ordered = tirx.Select(bits < tirx.const(0, key), tirx.bitwise_xor(bits, largest), bits)
    numbers = tirx.Select(x == tirx.const(0, dtype), tirx.const(0, key), ordered)
    return tirx.Select(tirx.isnan(x), largest, numbers)
