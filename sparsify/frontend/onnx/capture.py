"""ONNX models as exported programs, from which the way of a PyTorch model goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from sparsify.frontend.examples import Examples, serve_size_one
from sparsify.frontend.onnx.examples import example
from sparsify.frontend.onnx.file import read_onnx
from sparsify.frontend.onnx.model import OnnxModel
from sparsify.frontend.onnx.module import OnnxModule


def capture_onnx(
    path: str | os.PathLike[str], examples: Mapping[str, torch.Tensor] | None = None
) -> ExportedProgram:
    """The model in an ONNX file as torch.export sees it."""
    return export(read_onnx(path), examples)


def export(model: OnnxModel, examples: Mapping[str, torch.Tensor] | None = None) -> ExportedProgram:
    """A model that was read as torch.export sees it."""
    module = OnnxModule(model)
    given = examples or {i.name: example(i) for i in model.inputs}
    inputs = {a: given[i.name] for a, i in zip(module.arguments, model.inputs, strict=True)}
    problems = module.collect(inputs.values())
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{model.path}: {len(problems)} nodes cannot be imported:{listed}")
    shapes: dict[str, Any] = {
        argument: {d: Dim.AUTO for d, size in enumerate(declared.dims) if not isinstance(size, int)}
        for argument, declared in zip(module.arguments, model.inputs, strict=True)
    }
    with torch.no_grad():
        exported = torch.export.export(module, (), inputs, dynamic_shapes=shapes)
    return serve_size_one(exported, Examples((), inputs), module)
