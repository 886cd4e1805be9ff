"""Reads ONNX files."""

from __future__ import annotations

import os

import onnx

from sparsify.frontend.onnx.model import Input, OnnxModel
from sparsify.frontend.onnx.node import standard
from sparsify.frontend.onnx.tensors import torch_type


def read_onnx(path: str | os.PathLike[str]) -> OnnxModel:
    """The model in a file, checked."""
    return prepare(onnx.load(path), os.fspath(path))


def prepare(proto: onnx.ModelProto, path: str) -> OnnxModel:
    """A model in memory, checked."""
    graph = proto.graph
    stored = {tensor.name for tensor in graph.initializer}
    return OnnxModel(
        path,
        graph,
        {standard(entry.domain): entry.version for entry in proto.opset_import},
        tuple(_input(value) for value in graph.input if value.name not in stored),
        tuple(value.name for value in graph.output),
    )


def _input(value: onnx.ValueInfoProto) -> Input:
    tensor = value.type.tensor_type
    dims = [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in tensor.shape.dim
    ]
    return Input(value.name, torch_type(tensor.elem_type), tuple(dims))
