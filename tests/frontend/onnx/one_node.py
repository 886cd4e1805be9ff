"""Models of one node, imported and run by PyTorch, and what other runtimes give for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from sparsify.frontend.onnx.capture import export
from sparsify.frontend.onnx.file import read_onnx

MICROSOFT = "com.microsoft"
Array = np.ndarray


def one_node(
    operator: str,
    inputs: Sequence[Array | None],
    attributes: dict[str, Any],
    domain: str = "",
    outputs: int = 1,
    version: int = 20,
    constants: Sequence[int] = (),
) -> onnx.ModelProto:
    """A model of one node; the inputs in ``constants`` are initializers."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    node = helper.make_node(
        operator, names, [f"y{i}" for i in range(outputs)], "n", domain=domain, **attributes
    )
    declared, stored = [], []
    for i, (name, x) in enumerate(zip(names, inputs, strict=True)):
        if x is None:
            continue
        if i in constants:
            stored.append(onnx.numpy_helper.from_array(x, name))
            continue
        kind = helper.np_dtype_to_tensor_dtype(x.dtype)
        declared.append(helper.make_tensor_value_info(name, kind, x.shape))
    results = [onnx.ValueInfoProto(name=f"y{i}") for i in range(outputs)]
    graph = helper.make_graph([node], "g", declared, results, stored)
    imports = [helper.make_opsetid("", version)]
    if domain:
        imports.append(helper.make_opsetid(domain, 1))
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def imported(model: onnx.ModelProto, inputs: dict[str, Array], folder: Path) -> list[Array]:
    """What the importer's program gives, run by PyTorch."""
    path = folder / "one.onnx"
    path.write_bytes(model.SerializeToString())
    read = read_onnx(path)
    tensors = {i.name: torch.from_numpy(inputs[i.name].copy()) for i in read.inputs}
    exported = export(read, tensors, dynamic=False)
    results = exported.module()(*tensors.values())
    return [results[name].numpy() for name in read.outputs]


def onnxruntime(model: onnx.ModelProto, inputs: dict[str, Array]) -> list[Array]:
    runtime = pytest.importorskip("onnxruntime", reason="compares with ONNX Runtime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


def reference(model: onnx.ModelProto, inputs: dict[str, Array]) -> list[Array]:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model).run(None, inputs)


def compare(
    folder: Path,
    operator: str,
    inputs: Sequence[Array | None],
    attributes: dict[str, Any],
    peer: Any = onnxruntime,
    tolerance: float = 2e-5,
    **options: Any,
) -> None:
    model = one_node(operator, inputs, attributes, **options)
    constants = options.get("constants", ())
    given = {f"x{i}": x for i, x in enumerate(inputs) if x is not None and i not in constants}
    expected = peer(model, given)
    for e, f in zip(expected, imported(model, given, folder), strict=True):
        assert (e.shape, e.dtype) == (f.shape, f.dtype)
        np.testing.assert_allclose(f, e, rtol=tolerance, atol=tolerance)


def rand(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def ints(low: int, high: int, *shape: int, dtype: Any = np.int64, seed: int = 0) -> Array:
    return np.random.default_rng((seed, *shape)).integers(low, high, shape, dtype)


def number(value: float, dtype: Any = np.float32) -> Array:
    return np.array(value, dtype)
