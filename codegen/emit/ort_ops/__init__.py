"""The custom-operator library for ONNX Runtime: our kernels behind its C ABI."""

from sparsify.codegen.emit.ort_ops.build import build

__all__ = ["build"]
