"""ONNX models written as text, as `onnx.parser` reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import parser
from torch.export import ExportedProgram

from sparsify.frontend.onnx.capture import capture_onnx

HEADER = '<ir_version: 8, opset_import: ["" : {opset}{more}]>\n'

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write("g (float[N] x) => (float[N] y) { y = Relu(x) }")`` -> the path of the file."""

    def make(text: str, opset: int = 17, more: str = "", name: str = "model.onnx") -> Path:
        path = tmp_path / name
        onnx.save(parser.parse_model(HEADER.format(opset=opset, more=more) + text), path)
        return path

    return make


@pytest.fixture
def capture(write: Write) -> Callable[..., ExportedProgram]:
    """A text as exported program."""

    def run(text: str, opset: int = 17, more: str = "", **options: Any) -> ExportedProgram:
        return capture_onnx(write(text, opset, more), **options)

    return run


@pytest.fixture
def same_as_onnxruntime() -> Callable[..., None]:
    """Compares a callable with ONNX Runtime on inputs by name."""
    ort = pytest.importorskip("onnxruntime")

    def check(call: Any, path: Path, inputs: dict[str, torch.Tensor], tolerance: float) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = ort.InferenceSession(path, options)
        names = [output.name for output in session.get_outputs()]
        wanted = session.run(names, {name: x.numpy() for name, x in inputs.items()})
        found = call(*inputs.values())
        assert list(found) == names
        for name, expected in zip(names, wanted, strict=True):
            scale = max(1.0, float(np.abs(expected).max()))
            assert found[name].shape == expected.shape
            error = np.abs(found[name].numpy().astype(np.float64) - expected).max(initial=0)
            assert error <= tolerance * scale, f"{name} is off by {error} of {scale}"

    return check
