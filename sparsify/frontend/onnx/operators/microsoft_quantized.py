"""Operators that ONNX Runtime's quantiser writes: quantised in, quantised out, in between float32.

A quantised operand is three inputs: integers, their scale and their zero point.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.operators.pooling import average_pool
from sparsify.frontend.onnx.operators.quantization import dynamic_scale, integer_product
from sparsify.frontend.onnx.quantities import dequantise, quantise, saturate, spread
from sparsify.frontend.onnx.registry import MICROSOFT, Unsupported, operator

Zero = torch.Tensor | None


def _real(x: torch.Tensor, scale: torch.Tensor, zero: Zero) -> torch.Tensor:
    return dequantise(x, scale.reshape(()), None if zero is None else zero.reshape(()))


def _stored(y: torch.Tensor, scale: torch.Tensor, zero: Zero, dtype: torch.dtype) -> torch.Tensor:
    """``y`` quantised as its zero point's type, or, where there is none, as ``dtype``."""
    if zero is None:
        return quantise(y, scale.reshape(()).float(), None, dtype)
    return quantise(y, scale.reshape(()).float(), zero.reshape(()), zero.dtype)


def _two_operands(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def handle(
        node: Node,
        a: torch.Tensor,
        a_scale: torch.Tensor,
        a_zero: Zero,
        b: torch.Tensor,
        b_scale: torch.Tensor,
        b_zero: Zero,
        y_scale: torch.Tensor,
        y_zero: Zero = None,
    ) -> torch.Tensor:
        y = compute(_real(a, a_scale, a_zero), _real(b, b_scale, b_zero))
        return _stored(y, y_scale, y_zero, a.dtype)

    return handle


operator("QLinearAdd", domain=MICROSOFT)(_two_operands(torch.add))
operator("QLinearMul", domain=MICROSOFT)(_two_operands(torch.mul))


def _one_operand(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def handle(
        node: Node,
        x: torch.Tensor,
        x_scale: torch.Tensor,
        x_zero: Zero,
        y_scale: torch.Tensor,
        y_zero: Zero = None,
    ) -> torch.Tensor:
        return _stored(compute(node, _real(x, x_scale, x_zero)), y_scale, y_zero, x.dtype)

    return handle


def _leaky_relu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, node.get("alpha", 0.01))


def _softmax(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Before version 13 of the standard operators it ran over all dims from ``axis`` on."""
    axis = node.get("axis", -1)
    if node.get("opset", 13) >= 13:
        return torch.softmax(x, axis)
    return torch.softmax(x.flatten(axis % x.dim()), -1).reshape(x.shape)


def _channels_first(pool: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def compute(node: Node, x: torch.Tensor) -> torch.Tensor:
        if not node.get("channels_last", 0):
            return pool(node, x)
        return pool(node, x.movedim(-1, 1)).movedim(1, -1)

    return compute


def _global_average(node: Node, x: torch.Tensor) -> torch.Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


_ONE_OPERAND = {
    "QLinearSigmoid": lambda node, x: torch.sigmoid(x),
    "QLinearLeakyRelu": _leaky_relu,
    "QLinearSoftmax": _softmax,
    "QLinearAveragePool": _channels_first(average_pool),
    "QLinearGlobalAveragePool": _channels_first(_global_average),
}
for _name, _compute in _ONE_OPERAND.items():
    operator(_name, domain=MICROSOFT)(_one_operand(_compute))


@operator("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(
    node: Node, y_scale: torch.Tensor, y_zero: torch.Tensor, *operands: torch.Tensor
) -> torch.Tensor:
    """Integers, scale and zero point of each part, one after the other."""
    triples = zip(operands[::3], operands[1::3], operands[2::3], strict=True)
    y = torch.cat([_real(*triple) for triple in triples], node.require("axis"))
    return _stored(y, y_scale, y_zero, y_zero.dtype)


@operator("QGemm", domain=MICROSOFT)
def qgemm(
    node: Node,
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_zero: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_zero: torch.Tensor,
    c: torch.Tensor | None = None,
    y_scale: torch.Tensor | None = None,
    y_zero: Zero = None,
) -> torch.Tensor:
    """alpha * A B + C; C counts in units of alpha * a_scale * b_scale. Float without y_scale."""
    a = a.t() if node.get("transA", 0) else a
    b = b.t() if node.get("transB", 0) else b
    total = integer_product(a, b, a_zero, b_zero)
    if c is not None:
        total = total + c.to(total.dtype)
    factor = node.get("alpha", 1.0) * a_scale.reshape(()) * spread(b_scale, b, 1)
    if y_scale is None:
        return total.float() * factor
    if y_zero is None:
        raise Unsupported("a quantised result without a zero point, which tells its type")
    y = (total.float() * (factor / y_scale.reshape(()))).round() + y_zero.reshape(()).float()
    return saturate(y, y_zero.dtype)


@operator("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(
    node: Node,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    a_zero: Zero = None,
    b_zero: Zero = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``a_scale * b_scale * (A - a_zero)(B - b_zero) + bias`` in float32."""
    product = integer_product(a, b, a_zero, b_zero).float()
    y = product * (a_scale.reshape(()) * spread(b_scale, b, b.dim() - 1))
    return y if bias is None else y + bias


@operator("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_quantize_matmul(
    node: Node,
    x: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_zero: Zero = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A float matrix, quantised by its own extremes at each call, times a quantised one."""
    scale, zero = dynamic_scale(x)
    a = quantise(x, scale, zero, torch.uint8)
    return matmul_integer_to_float(node, a, b, scale, b_scale, zero.to(torch.uint8), b_zero, bias)
