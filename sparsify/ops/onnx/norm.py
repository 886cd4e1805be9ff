"""``fused_norm`` in ONNX: ``LayerNorm`` and ``RmsNorm``."""

from __future__ import annotations

from sparsify.ops.onnx.schema import FLOAT, OnnxOperator, Port, integer, lines

_X = Port("x", FLOAT, "[..., features]")
_Y = Port("y", FLOAT, "[..., features]")
_WEIGHT = Port("weight", FLOAT, "[features]")
_BIAS = Port("bias", FLOAT, "[features]")

LAYER = OnnxOperator(
    "LayerNorm",
    "fused_norm",
    "Layer normalisation of the last axis: (x - mean) / sqrt(variance + epsilon) * weight + bias.",
    (_X, _WEIGHT, _BIAS),
    (_Y,),
    {"epsilon": "float"},
    lines("y = LayerNormalization <axis: int = -1, epsilon: float = @epsilon> (x, weight, bias)"),
)
RMS = OnnxOperator(
    "RmsNorm",
    "fused_norm",
    "Root-mean-square normalisation of the last axis: x / sqrt(mean(x^2) + epsilon) * weight.",
    (_X, _WEIGHT),
    (_Y,),
    {"epsilon": "float"},
    lines(
        integer("last", -1),
        "two = Constant <value_float: float = 2.0> ()",
        "small = Constant <value_float: float = @epsilon> ()",
        "squares = Pow(x, two)",
        "mean = ReduceMean <keepdims: int = 1> (squares, last)",
        "risen = Add(mean, small)",
        "deviation = Sqrt(risen)",
        "normal = Div(x, deviation)",
        "y = Mul(normal, weight)",
    ),
)
KINDS = (LAYER, RMS)
