"""Elementwise arithmetic, comparison and logic, with NumPy's broadcasting.

Written on sizes too, for what exporters calculate with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import operator
from sparsify.frontend.onnx.values import Constant


def operand(node: Node, value: torch.Tensor | Constant, other: torch.Tensor | Constant) -> Any:
    """An operand for PyTorch: a Python number for one constant element that broadcasts.

    Passes know scales and epsilons by being numbers, and a number in the graph costs no load.
    """
    if not isinstance(value, Constant):
        return value
    single = value.tensor.numel() == 1
    if single and isinstance(other, torch.Tensor) and value.tensor.dim() <= other.dim():
        return value.item()
    return node.parameter(value)


def _binary(
    name: str, compute: Callable[[Any, Any], Any], on_sizes: Callable[[Any, Any], Any] | None = None
) -> None:
    @operator(
        name,
        since=7,
        constants=("a", "b"),
        on_sizes=None if on_sizes is None else lambda node, a, b: np.asarray(on_sizes(a, b)),
    )
    def run(node: Node, a: torch.Tensor | Constant, b: torch.Tensor | Constant) -> torch.Tensor:
        return compute(operand(node, a, b), operand(node, b, a))


def _divide(a: Any, b: Any) -> torch.Tensor:
    """Integers are divided towards zero."""
    tensor = a if isinstance(a, torch.Tensor) else b
    return a / b if tensor.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _divide_sizes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sizes are not negative, so rounding down is rounding towards zero."""
    floats = any(isinstance(x, float | torch.SymFloat) for x in (*a.flat, *b.flat))
    return a / b if floats else a // b


_binary("Add", lambda a, b: a + b, lambda a, b: a + b)
_binary("Sub", lambda a, b: a - b, lambda a, b: a - b)
_binary("Mul", lambda a, b: a * b, lambda a, b: a * b)
_binary("Div", _divide, _divide_sizes)


@operator("Relu")
def relu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x)
