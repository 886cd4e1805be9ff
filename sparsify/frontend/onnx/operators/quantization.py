"""Quantisation, and products of quantised tensors."""

from __future__ import annotations

import math

import torch
from onnx import TensorProto

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.operators.convolution import conv
from sparsify.frontend.onnx.quantities import (
    dequantise,
    exactly,
    quantise,
    saturate,
    spread,
    to_float4,
    without_zero,
)
from sparsify.frontend.onnx.registry import MICROSOFT, Unsupported, operator
from sparsify.frontend.onnx.tensors import NARROW, computed_type, onnx_type, torch_type


@operator("QuantizeLinear", since=10)
@operator("QuantizeLinear", domain=MICROSOFT)
def quantize_linear(
    node: Node, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
) -> torch.Tensor:
    axis, block = node.get("axis", 1), node.get("block_size", 0)
    code = node.get("output_dtype", 0)
    if zero is not None:
        code = node.element_type(2) or onnx_type(zero.dtype)
    dtype = torch_type(code or TensorProto.UINT8)
    scale = spread(scale, x, axis, block)
    if precision := node.get("precision", 0):
        x, scale = x.to(computed_type(precision)), scale.to(computed_type(precision))
    if code == TensorProto.FLOAT4E2M1:
        return to_float4(x.float() / scale.float())
    if dtype.is_floating_point:
        return _to_float8(x.float() / scale.float(), dtype, bool(node.get("saturate", 1)))
    if not x.dtype.is_floating_point:
        x = x.float()
    if zero is not None:
        zero = spread(zero.to(torch.int32), x, axis, block)
    return quantise(x.float(), scale.float(), zero, dtype, NARROW.get(code))


def _to_float8(x: torch.Tensor, dtype: torch.dtype, saturated: bool) -> torch.Tensor:
    if saturated:
        bound = torch.finfo(dtype).max
        x = torch.where(x.isnan(), x, x.clamp(-bound, bound))
    return x.to(dtype)


@operator("DequantizeLinear", since=10)
@operator("DequantizeLinear", domain=MICROSOFT)
def dequantize_linear(
    node: Node, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
) -> torch.Tensor:
    axis, block = node.get("axis", 1), node.get("block_size", 0)
    dtype = (
        computed_type(node.get("output_dtype", 0) or 1)
        if "output_dtype" in node.attributes
        else (scale.dtype)
    )
    if zero is not None:
        zero = None if zero.dtype.is_floating_point else spread(zero.float(), x, axis, block)
    return dequantise(x, spread(scale, x, axis, block), zero).to(dtype)


@operator("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(
    node: Node, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale, zero = dynamic_scale(x)
    return quantise(x, scale, zero, torch.uint8), scale, zero.to(torch.uint8)


def dynamic_scale(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point, both floating-point, with which uint8 spans all elements and 0."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, (-low / scale).clamp(0, 255).round()


@operator("MatMulInteger", since=10)
def matmul_integer(
    node: Node,
    a: torch.Tensor,
    b: torch.Tensor,
    a_zero: torch.Tensor | None = None,
    b_zero: torch.Tensor | None = None,
) -> torch.Tensor:
    return integer_product(a, b, a_zero, b_zero).to(torch.int32)


def integer_product(
    a: torch.Tensor,
    b: torch.Tensor,
    a_zero: torch.Tensor | None,
    b_zero: torch.Tensor | None,
) -> torch.Tensor:
    """The exact matrix product of integers less their zero points (by row of a, by column of b)."""
    a_axis = max(a.dim() - 2, 0)
    return exactly(
        torch.matmul,
        without_zero(a, a_zero, a_axis),
        without_zero(b, b_zero, b.dim() - 1),
        a.shape[-1],
    )


@operator("ConvInteger", since=10)
def conv_integer(
    node: Node,
    x: torch.Tensor,
    weight: torch.Tensor,
    x_zero: torch.Tensor | None = None,
    weight_zero: torch.Tensor | None = None,
) -> torch.Tensor:
    return _integer_convolution(node, x, weight, x_zero, weight_zero).to(torch.int32)


def _integer_convolution(
    node: Node,
    x: torch.Tensor,
    weight: torch.Tensor,
    x_zero: torch.Tensor | None,
    weight_zero: torch.Tensor | None,
) -> torch.Tensor:
    # Padding is the zero point, so it is zero here.
    return exactly(
        lambda a, b: conv(node, a, b),
        without_zero(x, x_zero),
        without_zero(weight, weight_zero),
        math.prod(weight.shape[1:]),
    )


@operator("QLinearMatMul", since=10)
def qlinear_matmul(
    node: Node,
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_zero: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_zero: torch.Tensor,
    y_scale: torch.Tensor,
    y_zero: torch.Tensor,
) -> torch.Tensor:
    product = integer_product(a, b, a_zero, b_zero).float()
    a_scale = spread(a_scale, a, max(a.dim() - 2, 0)).float()
    factor = a_scale * spread(b_scale, b, b.dim() - 1).float() / y_scale.reshape(-1)[0].float()
    y = (product * factor + y_zero.reshape(-1)[0].float()).round()
    return saturate(y, y_zero.dtype)


@operator("QLinearConv", since=10)
def qlinear_conv(
    node: Node,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    y_scale: torch.Tensor,
    y_zero: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    if node.get("channels_last", 0):
        raise Unsupported("channels_last")
    total = _integer_convolution(node, x, weight, x_zero, weight_zero)
    if bias is not None:
        total = total + bias.reshape((-1,) + (1,) * (x.dim() - 2)).to(total.dtype)
    factor = x_scale.reshape(()) * spread(weight_scale, total, 1) / y_scale.reshape(())
    y = (total.float() * factor).round() + y_zero.reshape(()).float()
    return saturate(y, y_zero.dtype)
