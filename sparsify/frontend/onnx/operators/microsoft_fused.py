"""Products and activations that ONNX Runtime's optimiser fuses, and its GELUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.operators.convolution import conv
from sparsify.frontend.onnx.operators.linear import gemm
from sparsify.frontend.onnx.registry import MICROSOFT, Unsupported, operator
from sparsify.frontend.onnx.values import Constant


@operator("Gelu", domain=MICROSOFT)
def gelu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x)


@operator("BiasGelu", domain=MICROSOFT)
def bias_gelu(node: Node, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(x + bias)


@operator("FastGelu", domain=MICROSOFT)
def fast_gelu(node: Node, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """GELU by tanh."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("QuickGelu", domain=MICROSOFT)
def quick_gelu(node: Node, x: torch.Tensor) -> torch.Tensor:
    alpha = node.get("alpha", 1.702)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("FusedMatMul", domain=MICROSOFT, constants=("b",))
def fused_matmul(node: Node, a: torch.Tensor, b: torch.Tensor | Constant) -> torch.Tensor:
    """alpha * A B, with the last two dims, or the first ones of the batch, transposed."""
    a = _transposed(node, a, "A")
    alpha = node.get("alpha", 1.0)
    if isinstance(b, Constant) and b.tensor.dim() == 2 and not node.get("transBatchB", 0):
        stored = bool(node.get("transB", 0))
        weight = node.parameter(b, *(() if stored else ("linear_t", _turned)))
        y = F.linear(a, weight)
    else:
        b = node.parameter(b) if isinstance(b, Constant) else b
        y = a @ _transposed(node, b, "B")
    return y if alpha == 1 else alpha * y


def _turned(weight: torch.Tensor) -> torch.Tensor:
    return weight.t().contiguous()


def _transposed(node: Node, x: torch.Tensor, side: str) -> torch.Tensor:
    if x.dim() < 2:
        return x
    if node.get(f"transBatch{side}", 0):
        # [batch..., m, k] is stored as [m, batch..., k].
        x = x.movedim(0, -2)
    return x.transpose(-1, -2) if node.get(f"trans{side}", 0) else x


@operator("FusedGemm", domain=MICROSOFT, constants=("a", "b", "c"))
def fused_gemm(
    node: Node,
    a: torch.Tensor | Constant,
    b: torch.Tensor | Constant,
    c: torch.Tensor | Constant | None = None,
) -> torch.Tensor:
    parameters = [node.get(f"activation_{name}") for name in ("alpha", "beta", "gamma")]
    return _activated(node, gemm(node, a, b, c), [p for p in parameters if p is not None])


@operator("FusedConv", domain=MICROSOFT)
def fused_conv(
    node: Node,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    y = conv(node, x, weight, bias)
    return _activated(
        node, y if residual is None else y + residual, node.get("activation_params", [])
    )


def _activated(node: Node, x: torch.Tensor, parameters: list[float]) -> torch.Tensor:
    name = node.get("activation", "")
    if not name:
        return x
    plain = {"Relu": torch.relu, "Tanh": torch.tanh, "Sigmoid": torch.sigmoid}
    if name in plain:
        return plain[name](x)
    if name == "LeakyRelu":
        return F.leaky_relu(x, parameters[0] if parameters else 0.01)
    if name == "Clip":
        return x.clamp(*parameters[:2])
    if name == "HardSigmoid":
        alpha, beta = parameters[:2] or (0.2, 0.5)
        return (alpha * x + beta).clamp(0, 1)
    raise Unsupported(f"the activation {name}")
