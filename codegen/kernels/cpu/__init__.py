"""Kernels for x86 and ARM from one template; importing the package registers them."""

from sparsify.codegen.kernels.cpu import (
    expert_linear,
    gate_rules,
    linear,
    linear_columns,
    linear_rows,
)

__all__ = ["expert_linear", "gate_rules", "linear", "linear_columns", "linear_rows"]
