"""Kernels for x86 and ARM from one template; importing the package registers them."""

from sparsify.codegen.kernels.cpu import gate_rules, linear, linear_rows

__all__ = ["gate_rules", "linear", "linear_rows"]
