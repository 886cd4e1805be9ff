"""Reads ONNX files, and refuses with a reason what is no file that can be run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import external_data_helper

from sparsify.frontend.onnx.functions import (
    Functions,
    check_calls,
    functions_of,
    inlined,
    versions_of,
)
from sparsify.frontend.onnx.model import Input, OnnxModel
from sparsify.frontend.onnx.registry import STANDARD, Unsupported, standard
from sparsify.frontend.onnx.sparse import densify
from sparsify.frontend.onnx.tensors import to_onnx, torch_type

OLDEST = 7
"""The first version of the standard operators that is read."""

Shapes = Mapping[str, tuple[int | str | None, ...]]


def read_onnx(
    path: str | os.PathLike[str],
    *,
    shapes: Shapes | None = None,
    constants: Mapping[str, Any] | None = None,
) -> OnnxModel:
    """The model in a file, with the weights beside it.

    Args:
        shapes, constants: see `prepare`.

    Raises:
        FileNotFoundError: there is no such file, or weights that it names are missing.
        ValueError: it is damaged, too large, of an operator version that is not read, or `prepare`
            refuses it.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.stat().st_size >= 2**31:
        raise ValueError(
            f"{file}: {file.stat().st_size / 2**30:.1f} GiB; protobuf ends at 2 GiB. Save the "
            "model with its weights beside it: onnx.save(..., save_as_external_data=True)"
        )
    try:
        proto = onnx.load_model_from_string(file.read_bytes())
    except Exception as error:  # protobuf's own, whose package is none of ours
        raise ValueError(f"{file}: not an ONNX file, or cut off: {error}") from error
    if not proto.HasField("graph"):
        raise ValueError(f"{file}: not an ONNX file: it holds no graph")
    _check_versions(proto, file)
    functions = functions_of(proto)
    try:
        check_calls(proto)
        proto = inlined(proto)
    except Exception as error:  # the onnx package's own, of several kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(f"{file}: its functions cannot be inlined: {reason}") from error
    for tensor in external_data_helper._get_all_tensors(proto):
        if external_data_helper.uses_external_data(tensor):
            _load_beside(tensor, file)
    return prepare(proto, str(file), functions, shapes=shapes, constants=constants)


def prepare(
    proto: onnx.ModelProto,
    path: str,
    functions: Functions | None = None,
    *,
    shapes: Shapes | None = None,
    constants: Mapping[str, Any] | None = None,
) -> OnnxModel:
    """A model in memory, whose functions are inlined and whose weights are loaded.

    Args:
        path: what error messages call it.
        functions: that may still be called, because they are of other operator versions.
        shapes: by input name, instead of the declared ones; a size is a number, or a name or None
            for a dynamic one.
        constants: values of inputs that then are none any more.

    Raises:
        ValueError: an unknown name, a shape that contradicts the declared one, or an input that
            is no tensor of a type and rank that are known.
    """
    graph = onnx.GraphProto()
    graph.CopyFrom(proto.graph)
    shapes, constants = dict(shapes or {}), dict(constants or {})
    densify(graph, path)
    names = [value.name for value in graph.input]
    for name in (*shapes, *constants):
        if name not in names:
            raise ValueError(f"{path}: has no input {name!r}; its inputs are {', '.join(names)}")
    for name, value in constants.items():
        declared = next(v for v in graph.input if v.name == name)
        graph.initializer.append(_constant(declared, value, path))
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [v for v in graph.input if v.name not in stored]
    return OnnxModel(
        path,
        graph,
        versions_of(proto),
        tuple(_input(value, shapes.get(value.name), path) for value in inputs),
        tuple(value.name for value in graph.output),
        tuple(_declared_type(value) for value in graph.output),
        functions or {},
    )


def _check_versions(proto: onnx.ModelProto, file: Path) -> None:
    own = versions_of(proto).get(STANDARD)
    if own is None and any(standard(node.domain) == STANDARD for node in proto.graph.node):
        raise ValueError(f"{file}: does not say of which version its operators are")
    newest = onnx.defs.onnx_opset_version()
    of_functions = [versions_of(function).get(STANDARD) for function in proto.functions]
    for version in (own, *of_functions):
        if version is None or OLDEST <= version <= newest:
            continue
        fix = (
            "convert it with onnx.version_converter.convert_version(model, 17)"
            if version < OLDEST
            else "install a newer onnx package"
        )
        raise ValueError(
            f"{file}: operators of version (opset) {version}; {OLDEST} to {newest} are read: {fix}"
        )


def _load_beside(tensor: onnx.TensorProto, file: Path) -> None:
    """Reads a weight from the file it lies in, which must be in the model's folder."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    beside = file.parent / location
    what = f"{file}: weight {tensor.name!r} lies in {location!r}"
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise ValueError(f"{what}, outside the model's folder, from where nothing is read")
    if not beside.is_file():
        raise FileNotFoundError(f"{what}, which is not there; put it beside the model")
    try:
        external_data_helper.load_external_data_for_tensor(tensor, str(file.parent))
    except Exception as error:
        raise ValueError(f"{what}, which cannot be read: {error}") from error
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]


def _constant(declared: onnx.ValueInfoProto, value: Any, path: str) -> onnx.TensorProto:
    dtype = _dtype(declared, path)
    try:
        tensor = torch.as_tensor(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: input {declared.name!r} cannot be {value!r}: {error}; it takes {dtype}"
        ) from error
    sizes = [dim.dim_value or None for dim in declared.type.tensor_type.shape.dim]
    known = declared.type.tensor_type.HasField("shape")
    if known and (
        len(sizes) != tensor.dim()
        or any(size not in (None, found) for size, found in zip(sizes, tensor.shape, strict=True))
    ):
        shape = ["?" if size is None else size for size in sizes]
        raise ValueError(
            f"{path}: input {declared.name!r} cannot have the shape {list(tensor.shape)} of the "
            f"given constant; it is declared as {shape}"
        )
    return to_onnx(tensor, declared.name)


def _dtype(value: onnx.ValueInfoProto, path: str) -> torch.dtype:
    if not value.type.HasField("tensor_type"):
        kind = value.type.WhichOneof("value") or "nothing"
        raise ValueError(f"{path}: input {value.name!r} is a {kind}; only tensors are supported")
    try:
        return torch_type(value.type.tensor_type.elem_type)
    except Unsupported as error:
        raise ValueError(f"{path}: input {value.name!r}: {error} is not supported") from error


def _declared_type(value: onnx.ValueInfoProto) -> torch.dtype | None:
    """What an output is declared as; None also where PyTorch has no such type.

    Of what such a value comes from, the import says so, for all nodes at once.
    """
    try:
        return torch_type(value.type.tensor_type.elem_type)
    except Unsupported:
        return None


def _input(
    value: onnx.ValueInfoProto, given: tuple[int | str | None, ...] | None, path: str
) -> Input:
    dtype = _dtype(value, path)
    tensor = value.type.tensor_type
    declared = [_size(dim) for dim in tensor.shape.dim] if tensor.HasField("shape") else None
    if given is None:
        if declared is None:
            raise ValueError(
                f"{path}: input {value.name!r} declares no shape; give one by shapes="
                f"{{{value.name!r}: ...}}, on the command line by --shape {value.name}=..."
            )
        return Input(value.name, dtype, tuple(declared))
    fits = declared is None or (
        len(declared) == len(given)
        and all(not isinstance(d, int) or d == g for d, g in zip(declared, given, strict=True))
    )
    if not fits or not all(g is None or isinstance(g, str) or g > 0 for g in given):
        raise ValueError(
            f"{path}: input {value.name!r} cannot have the shape {given}; it is declared as "
            f"{tuple(declared or ())}"
        )
    return Input(value.name, dtype, tuple(given))


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    """A size, the name of one, or None; converters write -1 and "?" for sizes without a name."""
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None
    return dim.dim_param if re.search(r"\w", dim.dim_param) else None
