"""``list_blocks`` in ONNX: the columns that are true in each row, ascending, then zeros."""

from __future__ import annotations

from sparsify.ops.onnx.schema import OnnxOperator, Port, integer, lines

_SHAPE = "[batch, heads, query_blocks, key_blocks]"

LIST_BLOCKS = OnnxOperator(
    "ListBlocks",
    "list_blocks",
    "The marked blocks of each row, ascending, and zeros after them.",
    (Port("marks", ("bool",), _SHAPE),),
    (Port("y", ("int32",), _SHAPE),),
    {},
    lines(
        integer("last", -1),
        "begin = Constant <value_int: int = 0> ()",
        "step = Constant <value_int: int = 1> ()",
        "columns = Shape <start: int = 3, end: int = 4> (marks)",
        "count = Squeeze(columns)",
        "places = Range(begin, count, step)",
        "ones = Cast <to: int = 7> (marks)",
        "marked = ReduceSum <keepdims: int = 1> (ones, last)",
        "from_the_end = Sub(columns, places)",
        "keys = Mul(ones, from_the_end)",
        "sorted, order = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (keys, columns)",
        "listed = Less(places, marked)",
        "found = Where(listed, order, begin)",
        "y = Cast <to: int = 6> (found)",
    ),
)

KINDS = (LIST_BLOCKS,)
