"""ATen operators that TVM's importer would read wrongly, slowly or unchecked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx
from tvm import relax, tirx

from sparsify.codegen.kernels.cpu.embedding import Embedding
from sparsify.codegen.kernels.cpu.softmax import Softmax
from sparsify.codegen.operators.arguments import arguments_of, extents_of, product, shape_of

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def convert_embedding(node: fx.Node, lowering: Lowering) -> Any:
    table, ids = (lowering.tensor(argument) for argument in node.args[:2])
    return _rows_of(lowering, table, ids)


def convert_index_select(node: fx.Node, lowering: Lowering) -> Any:
    """Rows of a float32 matrix by our kernel, which checks the indices; the rest by Relax."""
    a = arguments_of(node)
    x, index = lowering.tensor(a["self"]), lowering.tensor(a["index"])
    shape = shape_of(x)
    fixed = isinstance(shape[-1], tirx.IntImm)
    if len(shape) == 2 and a["dim"] in (0, -2) and fixed and str(x.ty.dtype) == "float32":
        return _rows_of(lowering, x, index)
    return lowering.block_builder.emit(relax.op.take(x, index, a["dim"] % len(shape)))


def _rows_of(lowering: Lowering, table: Any, ids: Any) -> Any:
    rows, features = shape_of(table)
    count = product(shape_of(ids))
    fixed = int(rows) if isinstance(rows, tirx.IntImm) else None
    kernel = Embedding(lowering.target.isa, fixed, int(features), str(ids.ty.dtype))
    flat = lowering.call_kernel(kernel, [table, lowering.reshape(ids, (count,))], (count, features))
    return lowering.reshape(flat, (*shape_of(ids), features))


def convert_slice(node: fx.Node, lowering: Lowering) -> Any:
    """A slice whose extent the graph knows: TVM's importer would clamp it to the input's."""
    source, a = node.args[0], arguments_of(node)
    x, dim, step = lowering.tensor(source), a["dim"], a["step"]
    dim %= len(shape_of(x))
    size = lowering.extent(node.meta["val"].shape[dim])
    (begin,) = extents_of(lowering, [0 if a["start"] is None else a["start"]])
    if isinstance(begin, tirx.IntImm) and begin.value < 0:
        begin = shape_of(x)[dim] + begin
    end = begin + size * step
    return lowering.block_builder.emit(
        relax.op.strided_slice(x, [dim], [begin], [end], [step], assume_inbound=True)
    )


def convert_select(node: fx.Node, lowering: Lowering) -> Any:
    """One entry of a dim, as a slice; TVM's importer would gather it, unchecked."""
    a = arguments_of(node)
    x = lowering.tensor(a["self"])
    dim = a["dim"] % len(shape_of(x))
    (begin,) = extents_of(lowering, [a["index"]])
    if isinstance(begin, tirx.IntImm) and begin.value < 0:
        begin = shape_of(x)[dim] + begin
    entry = lowering.block_builder.emit(
        relax.op.strided_slice(x, [dim], [begin], [begin + 1], [1], assume_inbound=True)
    )
    return lowering.reshape(entry, lowering.type_of(node.meta["val"]).shape.values)


def convert_scalar_tensor(node: fx.Node, lowering: Lowering) -> Any:
    """A number, or a size, which is the only entry of a range that begins with it."""
    value, dtype = node.args[0], str(lowering.type_of(node.meta["val"]).dtype)
    if not isinstance(value, fx.Node):
        return relax.const(value, dtype)
    (size,) = extents_of(lowering, [value])
    entry = lowering.block_builder.emit(relax.op.arange(size, size + 1, 1, "int64"))
    if dtype != "int64":
        entry = lowering.block_builder.emit(relax.op.astype(entry, dtype))
    return lowering.reshape(entry, ())


def convert_softmax(node: fx.Node, lowering: Lowering) -> Any:
    """Over the last dim of float32 by our kernel, else by Relax."""
    a = arguments_of(node)
    x = lowering.tensor(a["self"])
    shape = shape_of(x)
    last = a["dim"] in (-1, len(shape) - 1) and bool(shape)
    if not last or str(x.ty.dtype) != "float32":
        return lowering.block_builder.emit(relax.op.nn.softmax(x, a["dim"]))
    rows = (product(shape[:-1]), shape[-1])
    y = lowering.call_kernel(Softmax(lowering.target.isa), [lowering.reshape(x, rows)], rows)
    return lowering.reshape(y, shape)
