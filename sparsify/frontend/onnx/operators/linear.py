"""Matrix products; those with a weight are linear layers with a weight [out, in]."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import operator
from sparsify.frontend.onnx.values import Constant, untraced

Operand = torch.Tensor | Constant


@operator("MatMul", constants=("a", "b"))
def matmul(node: Node, a: Operand, b: Operand) -> torch.Tensor:
    if isinstance(b, Constant) and b.tensor.dim() == 2 and isinstance(a, torch.Tensor):
        return F.linear(a, _weight(node, b, transposed=True))
    if (
        isinstance(a, Constant)
        and a.tensor.dim() == 2
        and isinstance(b, torch.Tensor)
        and b.dim() > 1
    ):
        return F.linear(b.transpose(-1, -2), node.parameter(a)).transpose(-1, -2)
    return torch.matmul(_tensor(node, a), _tensor(node, b))


@operator("SparseToDenseMatMul", domain="com.microsoft", constants=("a", "b"))
def sparse_to_dense_matmul(node: Node, a: Operand, b: Operand) -> torch.Tensor:
    """alpha * A B of ONNX Runtime, A a sparse initializer."""
    return gemm(node, a, b)


@operator("Gemm", since=7, constants=("a", "b", "c"))
def gemm(node: Node, a: Operand, b: Operand, c: Operand | None = None) -> torch.Tensor:
    """alpha * A B + beta * C, A and B as they are or transposed."""
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if isinstance(a, Constant) and isinstance(b, torch.Tensor):
        right = b if node.get("transB", 0) else b.t()
        weight = _weight(node, a, transposed=bool(node.get("transA", 0)), scale=alpha)
        product = F.linear(right, weight).t()
    elif isinstance(b, Constant):
        left = _left(node, a)
        weight = _weight(node, b, transposed=not node.get("transB", 0), scale=alpha)
        bias = _bias(node, c, weight.shape[0], beta)
        product = F.linear(left, weight, bias)
        if bias is not None:
            return product
    else:
        product = _left(node, a) @ (b.t() if node.get("transB", 0) else b)
        product = product if alpha == 1 else alpha * product
    if c is None:
        return product
    added = _tensor(node, c)
    return product + (added if beta == 1 else beta * added)


def _left(node: Node, a: Operand) -> torch.Tensor:
    left = _tensor(node, a)
    return left.t() if node.get("transA", 0) else left


def _tensor(node: Node, value: Operand) -> torch.Tensor:
    return node.parameter(value) if isinstance(value, Constant) else value


def _weight(node: Node, b: Constant, transposed: bool, scale: float = 1.0) -> torch.Tensor:
    """A constant as [out, in]."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.t().contiguous() if transposed else tensor
        return tensor if scale == 1 else scale * tensor

    return node.parameter(b, f"linear{'_t' * transposed}{scale}", change)


def _bias(node: Node, c: Operand | None, size: int, scale: float) -> torch.Tensor | None:
    """A constant as the bias [out] of a linear layer; None for one that differs by row."""
    if not isinstance(c, Constant):
        return None
    with untraced():
        shape = c.tensor.shape
    if any(extent != 1 for extent in shape[:-1]) or not set(shape[-1:]) <= {1, size}:
        return None
    return node.parameter(
        c, f"bias{size}*{scale}", lambda t: scale_of(t, scale).expand(1, size)[0].contiguous()
    )


def scale_of(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """The tensor times a number, itself for 1."""
    return tensor if scale == 1 else tensor * scale
