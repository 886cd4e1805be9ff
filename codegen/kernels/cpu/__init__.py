"""Kernels for x86 and ARM from one template; importing the package registers them."""

from sparsify.codegen.kernels.cpu import linear, linear_columns, linear_rows

__all__ = ["linear", "linear_columns", "linear_rows"]
