"""Handlers of ONNX operators, one file an operator family; all files are found and imported."""
