"""Portable programs to ONNX files."""

from sparsify.codegen.emit.onnx.export import OnnxSummary, export

__all__ = ["OnnxSummary", "export"]
