"""Models that are given as the path of a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch.export import ExportedProgram


def capture_file(
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    shapes: Mapping[str, Any] | None = None,
    constants: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = "auto",
) -> ExportedProgram:
    """The model in an ONNX file as torch.export sees it; arguments as ``sparsify.compile``.

    Raises:
        TypeError, ValueError, FileNotFoundError: it is another file, or see `capture_onnx`.
    """
    text = os.fspath(path)
    if not text.endswith(".onnx"):
        raise TypeError(
            f"model is the path {text!r}; of files, those that end in .onnx are compiled: load a "
            ".pt2 file with torch.export.load, a .sparsify file with sparsify.load"
        )
    if dynamic_shapes not in ("auto", None):
        raise ValueError(
            "dynamic_shapes is for PyTorch models; the dims of an ONNX file are dynamic where it "
            "says so, and shapes={name: sizes} changes that"
        )
    try:
        from sparsify.frontend.onnx.capture import capture_onnx
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{text}: ONNX files need the package {error.name}: pip install onnx"
        ) from error
    return capture_onnx(
        text,
        example_inputs,
        shapes=shapes,
        constants=constants,
        dynamic=dynamic_shapes == "auto",
    )
