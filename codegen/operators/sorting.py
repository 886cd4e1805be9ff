"""``sort``, ``argsort`` and ``topk`` in PyTorch's order: NaN is largest, equal ones as they came.

TVM's sort compares numbers, and where none of two is the larger, as with NaN, its order is none.
So floating-point numbers are sorted by keys, integers in the same order::

    x ->  key(x)  -> argsort / topk -> positions -> gather(x, positions)

The bits of a positive number ascend as the number does; those of a negative one descend, and are
turned around. Both zeros have one key, and every NaN has the largest.
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


def convert_argsort(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    return _positions(lowering, lowering.tensor(a["self"]), a["dim"], a["descending"])


def convert_sort(node: fx.Node, lowering: Lowering) -> Any:
    """A tuple of values and positions."""
    a = arguments_of(node)
    x, dim = lowering.tensor(a["self"]), a["dim"]
    return _gathered(lowering, x, _positions(lowering, x, dim, a["descending"]), dim)


def convert_topk(node: fx.Node, lowering: Lowering) -> Any:
    """A tuple of values and positions; sorted, whether that is asked for or not."""
    a = arguments_of(node)
    x, dim = lowering.tensor(a["self"]), a["dim"]
    positions = relax.op.topk(
        _keys(lowering, x), a["k"], dim, "indices", largest=a["largest"], dtype="int64"
    )
    return _gathered(lowering, x, lowering.block_builder.emit(positions), dim)


def _positions(lowering: Lowering, x: Any, dim: int, descending: bool) -> Any:
    keys = _keys(lowering, x)
    return lowering.block_builder.emit(relax.op.argsort(keys, dim, descending, "int64"))


def _gathered(lowering: Lowering, x: Any, positions: Any, dim: int) -> Any:
    dim %= len(shape_of(x))
    values = lowering.block_builder.emit(relax.op.gather_elements(x, positions, dim))
    return lowering.block_builder.emit(relax.Tuple([values, positions]))


def _keys(lowering: Lowering, x: Any) -> Any:
    """Integers that compare as the numbers do."""
    return each(lowering, x, _key, "order") if is_float(x) else x


def _key(x: Any) -> Any:
    integer = str(x.ty.dtype).replace("float", "int")
    bits, most = tirx.reinterpret(integer, x), tirx.max_value(integer)
    zero = tirx.const(0, integer)
    ordered = tirx.Select(bits < zero, bits ^ most, bits)
    return tirx.Select(
        tirx.isnan(x), most, tirx.Select(x == tirx.const(0, x.ty.dtype), zero, ordered)
    )
