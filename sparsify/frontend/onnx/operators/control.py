"""Control flow that is decided while tracing."""

from __future__ import annotations

import numpy as np

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import operator
from sparsify.frontend.onnx.values import Value


@operator("If", host=("condition",))
def if_(node: Node, condition: np.ndarray) -> tuple[Value, ...]:
    """The branch that a constant condition takes; the other one need not be importable."""
    taken = "then_branch" if bool(condition.item()) else "else_branch"
    return tuple(node.run(node.require(taken)))
