"""Activation functions."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import Unsupported, operator


@operator("Relu")
def relu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x)


@operator("Sigmoid")
def sigmoid(node: Node, x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x)


@operator("Tanh")
def tanh(node: Node, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x)


@operator("Softplus")
def softplus(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.softplus(x)


@operator("Softsign")
def softsign(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.softsign(x)


@operator("HardSwish", since=14)
def hard_swish(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.hardswish(x)


@operator("Mish", since=18)
def mish(node: Node, x: torch.Tensor) -> torch.Tensor:
    """``x tanh(log(1 + e^x))`` without the logarithm, which loses digits of small ``e^x``."""
    e = torch.exp(x.clamp(max=20))
    n = e * (e + 2)
    return x * (n / (n + 2))


@operator("Gelu", since=20)
def gelu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate=node.get("approximate", "none"))


@operator("Swish", since=24)
def swish(node: Node, x: torch.Tensor) -> torch.Tensor:
    alpha = node.get("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("HardSigmoid")
def hard_sigmoid(node: Node, x: torch.Tensor) -> torch.Tensor:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return (alpha * x + beta).clamp(0, 1)


@operator("LeakyRelu")
def leaky_relu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, node.get("alpha", 0.01))


@operator("ThresholdedRelu", since=10)
def thresholded_relu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > node.get("alpha", 1.0), x, 0)


@operator("Elu")
def elu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.elu(x, node.get("alpha", 1.0))


@operator("Selu")
def selu(node: Node, x: torch.Tensor) -> torch.Tensor:
    alpha, gamma = node.get("alpha", 1.6732632), node.get("gamma", 1.0507010)
    return gamma * F.elu(x, alpha)


@operator("Celu", since=12)
def celu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.celu(x, node.get("alpha", 1.0))


@operator("Shrink", since=9)
def shrink(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Towards zero by ``bias``; zero up to ``lambd``."""
    bias, bound = node.get("bias", 0.0), node.get("lambd", 0.5)
    low, high = torch.where(x < -bound, x + bias, 0), torch.where(x > bound, x - bias, 0)
    return (low + high).to(x.dtype)


@operator("PRelu", since=7)
def prelu(node: Node, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """The slope broadcasts to the input, from the right."""
    return torch.where(x < 0, x * slope, x)


@operator("Softmax")
def softmax(node: Node, x: torch.Tensor) -> torch.Tensor:
    return _over(node, x, lambda t, dim: F.softmax(t, dim))


@operator("LogSoftmax")
def log_softmax(node: Node, x: torch.Tensor) -> torch.Tensor:
    return _over(node, x, lambda t, dim: F.log_softmax(t, dim))


@operator("Hardmax")
def hardmax(node: Node, x: torch.Tensor) -> torch.Tensor:
    """One at the first of the largest elements, zero elsewhere."""

    def compute(t: torch.Tensor, dim: int) -> torch.Tensor:
        first = t.argmax(dim, keepdim=True)
        return torch.zeros_like(t).scatter(dim, first, 1)

    return _over(node, x, compute)


def _over(node: Node, x: torch.Tensor, compute) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Over one dim; up to version 12 over all dims from ``axis`` on together."""
    if node.version >= 13:
        return compute(x, node.get("axis", -1))
    axis = node.get("axis", 1)
    axis += x.dim() if axis < 0 else 0
    if axis == x.dim() - 1:
        return compute(x, axis)
    if axis >= x.dim():
        raise Unsupported(f"axis {axis} of {x.dim()} dims")
    return compute(x.flatten(axis), -1 if axis else 0).reshape(x.shape)
