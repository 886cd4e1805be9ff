"""Control flow that is decided while tracing."""

from __future__ import annotations

import numpy as np
import torch

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import operator
from sparsify.frontend.onnx.values import Value, sizes


@operator("OptionalHasElement", since=18)
def optional_has_element(node: Node, x: torch.Tensor | None = None) -> np.ndarray:
    """Of a tensor, which is there or left out."""
    return sizes(x is not None)


@operator("OptionalGetElement", since=18)
def optional_get_element(node: Node, x: torch.Tensor) -> torch.Tensor:
    return x


@operator("If", host=("condition",))
def if_(node: Node, condition: np.ndarray) -> tuple[Value, ...]:
    """The branch that a constant condition takes; the other one need not be importable."""
    taken = "then_branch" if bool(condition.item()) else "else_branch"
    return tuple(node.run(node.require(taken)))
