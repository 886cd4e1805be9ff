"""The ONNX domain ``sparsify``, version 1: every operator of ours as standard operators.

One file a family. `ONNX_OPERATORS` is the whole domain: names, inputs in order, attributes,
outputs and function bodies, which exporters write and a library of kernels serves.
"""

from sparsify.ops.onnx import (
    active,
    attention,
    block_attention,
    block_selection,
    experts,
    gate,
    gated,
    kv_cache,
    lanes,
    linear,
    list_blocks,
    norm,
    page_selection,
    rotary,
    route,
)
from sparsify.ops.onnx.schema import DOMAIN, OPSET, VERSION, OnnxOperator, Port

_FAMILIES = (
    linear,
    active,
    norm,
    attention,
    block_attention,
    list_blocks,
    block_selection,
    rotary,
    gate,
    gated,
    route,
    experts,
    kv_cache,
    page_selection,
    lanes,
)

ONNX_OPERATORS: dict[str, OnnxOperator] = {
    operator.name: operator for family in _FAMILIES for operator in family.KINDS
}

__all__ = ["DOMAIN", "ONNX_OPERATORS", "OPSET", "VERSION", "OnnxOperator", "Port"]
