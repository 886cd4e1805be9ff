"""Which operators the back end can compile, and compiles rightly."""

from __future__ import annotations

from functools import cache

import torch
from torch import fx

from sparsify.codegen.operators import CONVERTERS, REFUSALS
from sparsify.codegen.trust import casts_halves, untrusted_reason
from sparsify.effects import is_written

_DTYPES = frozenset(
    {torch.float32, torch.float64, torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8}
    | {torch.uint16, torch.uint32, torch.uint64, torch.bool}
)


def unsupported_reason(node: fx.Node) -> str | None:
    """None when the node can be compiled, else the reason for a user to read."""
    value = node.meta.get("val")
    if isinstance(value, int | torch.SymInt):
        return None
    name = getattr(node.target, "__name__", str(node.target))
    if name not in _known_operators():
        return f"{node.target} has no lowering"
    for operand in node.all_input_nodes:
        if isinstance(operand.meta.get("val"), torch.SymFloat | torch.SymBool):
            return f"{node.target} reads a fraction or a comparison of sizes, which no kernel takes"
    values = value if isinstance(value, tuple | list) else [value]
    for result in values:
        if not isinstance(result, torch.Tensor):
            return f"{node.target} returns {type(result).__name__}, not tensors"
        if result.dtype not in _DTYPES and not casts_halves(node):
            return f"{node.target} computes in {result.dtype}, for which there are no kernels"
    if name not in CONVERTERS and any(map(is_written, node.all_input_nodes)):
        # TVM fuses its own kernels, and so moves them past calls that it takes for independent.
        return f"{node.target} reads a tensor that the program changes in place"
    refuse = REFUSALS.get(name)
    return untrusted_reason(node) if refuse is None else refuse(node)


@cache
def _known_operators() -> frozenset[str]:
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    return frozenset(ExportedProgramImporter().convert_map) | frozenset(CONVERTERS)
