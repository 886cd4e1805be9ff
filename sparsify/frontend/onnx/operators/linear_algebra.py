"""Products by index notation, and determinants."""

from __future__ import annotations

import torch

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import operator


@operator("Einsum", since=12)
def einsum(node: Node, *operands: torch.Tensor) -> torch.Tensor:
    return torch.einsum(node.require("equation").replace(" ", ""), *operands)


@operator("Det", since=11)
def det(node: Node, x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.det(x)
