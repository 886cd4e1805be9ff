"""The domain's operators as rows of a C table, and which are left to their function bodies."""

from __future__ import annotations

import re

from sparsify.ops import ACTIVATIONS
from sparsify.ops.onnx import ONNX_OPERATORS, OnnxOperator

FUNCTION_BODIES = {
    "route": "a token's takes tens of operations beside the millions of its experts",
    "experts": "a loop of products that ONNX Runtime multiplies as fast as kernels of any shape do",
    "gated_linear": "its body multiplies by the gate what the standard kernel of MatMul computes",
    "kv_append": "ONNX has no state: the whole cache is copied at every step, whatever runs it",
    "paged_attention": "it reads the cache that kv_append copies; language models need state",
    "list_blocks": "its map has one element a block of keys, attention some thousands",
    "gate": "a comparison of a few KB: less than a hundredth of the linear that it feeds",
    "page_bounds": "it writes state beside the cache, which is copied at every step",
    "select_blocks": "it chooses what paged_attention reads of the copied cache",
    "select_pages": "it chooses what paged_attention reads of the copied cache",
    "to_lanes": "exported files hold portable programs, which have no lanes",
    "from_lanes": "exported files hold portable programs, which have no lanes",
}
"""Families that the library does not serve, with the reason; their function bodies run."""

_LINEARS = ("sparse_linear", "active_linear", "gated_linear")

_TYPES = {"float": "ORT_FLOAT", "int32": "ORT_INT32", "int64": "ORT_INT64", "bool": "ORT_BOOL"}


def served() -> tuple[OnnxOperator, ...]:
    """The operators that the library has kernels for."""
    return tuple(op for op in ONNX_OPERATORS.values() if op.family not in FUNCTION_BODIES)


def operator_rows() -> list[str]:
    """One initialiser of `Operator` each."""
    return [_row(operator) for operator in served()]


def _row(operator: OnnxOperator) -> str:
    types = [
        _TYPES.get(port.types[0], "ORT_ANY") if len(port.types) == 1 else "ORT_ANY"
        for port in operator.inputs
    ]
    fields = {
        "name": f'"{operator.name}"',
        "family": _family(operator),
        "inputs": str(len(operator.inputs)),
        "input_type": f"{{{', '.join(types)}}}",
        **_FIELDS.get(operator.family, lambda _: {})(operator),
    }
    return "{" + ", ".join(f".{name} = {value}" for name, value in fields.items()) + "}"


def _family(operator: OnnxOperator) -> str:
    if operator.family == "fused_norm":
        return "LAYER_NORM" if operator.name == "LayerNorm" else "RMS_NORM"
    names = dict.fromkeys(_LINEARS, "LINEAR")
    names |= dict.fromkeys(("fused_attention", "block_attention"), "ATTENTION")
    return names.get(operator.family, operator.family.upper())


def _linear(operator: OnnxOperator) -> dict[str, str]:
    match = re.fullmatch(
        r"(?:Active|Gated)?Linear(Csr|Bitmap|Dense)(Bias)?(.*?)(Add)?", operator.name
    )
    assert match is not None, operator.name
    storage, bias, activation, residual = match.groups()
    return {
        "storage": storage.upper(),
        "activation": str(_activation(activation)),
        "bias": "true" if bias else "false",
        "residual": "true" if residual else "false",
        "active": "true" if operator.family == "active_linear" else "false",
        "gated": "true" if operator.family == "gated_linear" else "false",
    }


def _gated(operator: OnnxOperator) -> dict[str, str]:
    return {"activation": str(_activation(operator.name.removeprefix("Gated")))}


def _attention(operator: OnnxOperator) -> dict[str, str]:
    mask = re.fullmatch(r"(?:Block)?Attention(Mask|Bias)?(Causal)?.*", operator.name)
    assert mask is not None, operator.name
    kinds = {None: "MASK_NONE", "Mask": "MASK_BOOL", "Bias": "MASK_FLOAT"}
    flags = {
        "causal": mask[2] is not None,
        "listed": operator.family == "block_attention",
        "window": "window" in operator.attributes,
        "softcap": "softcap" in operator.attributes,
    }
    return {"mask": kinds[mask[1]], **{name: str(flag).lower() for name, flag in flags.items()}}


def _activation(camel: str) -> int:
    """An activation's place, from what an operator's name says of it."""
    plain = [name.replace("_", "") for name in ACTIVATIONS]
    return plain.index(camel.lower() or "none")


_FIELDS = {
    **dict.fromkeys(_LINEARS, _linear),
    "gated": _gated,
    "fused_attention": _attention,
    "block_attention": _attention,
}
