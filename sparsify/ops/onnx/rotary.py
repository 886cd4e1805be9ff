"""``rotary`` in ONNX: ``Rotary``."""

from __future__ import annotations

from sparsify.ops.onnx.schema import FLOAT, OnnxOperator, Port, extent, integer, lines

ROTARY = OnnxOperator(
    "Rotary",
    "rotary",
    "Rotary position embedding of the first heads of each token: a head (a, b) of two halves "
    "becomes (a, b) * cos + (-b, a) * sin. Features after the heads are copied.",
    (
        Port("x", FLOAT, "[..., features], features at least heads * head_dim"),
        Port("cos", FLOAT, "[..., head_dim], leading extents as of x"),
        Port("sin", FLOAT, "[..., head_dim], leading extents as of x"),
    ),
    (Port("y", FLOAT, "[..., features]"),),
    {"heads": "int", "head_dim": "int"},
    lines(
        integer("none", 0),
        integer("one", 1),
        integer("last", -1),
        integer("before_last", -2),
        integer("behind", 2**63 - 1),
        *extent("head_count", "heads"),
        *extent("head_size", "head_dim"),
        "turning = Mul(head_count, head_size)",
        "turned_features = Slice(x, none, turning, last)",
        "kept = Slice(x, turning, behind, last)",
        "leading = Shape <start: int = 0, end: int = -1> (x)",
        "split_shape = Concat <axis: int = 0> (leading, head_count, head_size)",
        "joined_shape = Concat <axis: int = 0> (leading, turning)",
        "split = Reshape(turned_features, split_shape)",
        "cosine = Unsqueeze(cos, before_last)",
        "sine = Unsqueeze(sin, before_last)",
        "a, b = Split <axis: int = -1, num_outputs: int = 2> (split)",
        "minus_b = Neg(b)",
        "crossed = Concat <axis: int = -1> (minus_b, a)",
        "along = Mul(split, cosine)",
        "across = Mul(crossed, sine)",
        "sum = Add(along, across)",
        "turned = Reshape(sum, joined_shape)",
        "y = Concat <axis: int = -1> (turned, kept)",
    ),
)
KINDS = (ROTARY,)
