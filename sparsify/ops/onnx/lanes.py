"""``to_lanes`` and ``from_lanes`` in ONNX: ``ToLanes`` and ``FromLanes``."""

from __future__ import annotations

from sparsify.layouts import LANES
from sparsify.ops.onnx.schema import FLOAT, OnnxOperator, Port, integer, lines

TO_LANES = OnnxOperator(
    "ToLanes",
    "to_lanes",
    f"Rows to lanes: {LANES} tokens side by side, features above; unused lanes are zero.",
    (Port("x", FLOAT, "[..., features]"),),
    (Port("y", FLOAT, f"[ceil(tokens / {LANES}), features, {LANES}]"),),
    {},
    lines(
        integer("none", 0),
        integer("last", -1),
        integer("lanes", LANES),
        "features = Shape <start: int = -1> (x)",
        "row_shape = Concat <axis: int = 0> (last, features)",
        "rows = Reshape(x, row_shape)",
        "tokens = Shape <start: int = 0, end: int = 1> (rows)",
        "negative = Neg(tokens)",
        "missing = Mod(negative, lanes)",
        "pads = Concat <axis: int = 0> (none, none, missing, none)",
        "padded = Pad(rows, pads)",
        "group_shape = Concat <axis: int = 0> (last, lanes, features)",
        "groups = Reshape(padded, group_shape)",
        "y = Transpose <perm: ints = [0, 2, 1]> (groups)",
    ),
)
FROM_LANES = OnnxOperator(
    "FromLanes",
    "from_lanes",
    "Lanes to rows of the given leading extents; unused lanes are dropped.",
    (
        Port("x", FLOAT, f"[ceil(tokens / {LANES}), features, {LANES}]"),
        Port("leading", ("int64",), "[rank], its product is the number of tokens"),
    ),
    (Port("y", FLOAT, "[*leading, features]"),),
    {},
    lines(
        integer("none", 0),
        integer("last", -1),
        "features = Shape <start: int = 1, end: int = 2> (x)",
        "row_shape = Concat <axis: int = 0> (last, features)",
        "groups = Transpose <perm: ints = [0, 2, 1]> (x)",
        "padded = Reshape(groups, row_shape)",
        "tokens = ReduceProd <keepdims: int = 1> (leading)",
        "rows = Slice(padded, none, tokens, none)",
        "y_shape = Concat <axis: int = 0> (leading, features)",
        "y = Reshape(rows, y_shape)",
    ),
)
KINDS = (TO_LANES, FROM_LANES)
