"""A node of our domain in a graph that ``torch.onnx.export`` builds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsify.ops.onnx import DOMAIN, VERSION, OnnxOperator


def emit(operator: OnnxOperator, inputs: Sequence[Any], **attributes: Any) -> Any:
    """Adds a node to the graph that is being translated; its output or outputs."""
    from onnxscript.values import Op, Opset

    missing = operator.attributes.keys() ^ attributes.keys()
    assert not missing and len(inputs) == len(operator.inputs), (operator.name, missing)
    node = Op(Opset(DOMAIN, VERSION), operator.name, operator.op_schema())
    return node(*inputs, **attributes)
