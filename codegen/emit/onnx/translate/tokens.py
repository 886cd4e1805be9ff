"""Operators that treat every token alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsify.codegen.emit.onnx.translate.node import emit
from sparsify.ops.onnx import gate as rules
from sparsify.ops.onnx import gated as gates
from sparsify.ops.onnx import norm as norms
from sparsify.ops.onnx import rotary as rotaries


def fused_norm(
    x: Any, weight: Any, bias: Any, epsilon: float, kind: str = "layer", lanes: bool = False
) -> Any:
    assert not lanes
    scale = _vector(x, 1.0) if weight is None else weight
    if kind == "rms":
        return emit(norms.RMS, [x, scale], epsilon=epsilon)
    shift = _vector(x, 0.0) if bias is None else bias
    return emit(norms.LAYER, [x, scale, shift], epsilon=epsilon)


def _vector(x: Any, value: float) -> Any:
    """A constant for each feature of ``x``."""
    import onnxscript

    array = np.full(int(x.shape[-1]), value, np.float32)
    return onnxscript.opset18.Constant(value=onnxscript.ir.tensor(array))


def rotary(x: Any, cos: Any, sin: Any, heads: int, head_dim: int, lanes: bool = False) -> Any:
    assert not lanes
    return emit(rotaries.ROTARY, [x, cos, sin], heads=heads, head_dim=head_dim)


def gate(x: Any, rule: str, parameters: Sequence[Any], lanes: bool = False) -> Any:
    assert not lanes
    operator, attributes = rules.gate(rule, int(x.shape[-1]))
    return emit(operator, [x, *parameters], **attributes)


def gated(x: Any, activation: str, lanes: bool = False) -> Any:
    assert not lanes
    return emit(gates.gated(activation), [x], activation=activation)
