"""Recurrent layers are unrolled: a dynamic length is told with the way out, dynamic batches run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import sparsify
from tests.frontend.onnx.one_node import rand

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
FEATURES, HIDDEN = 5, 7


def recurrent(operator: str, length: int | str, folder: Path) -> Path:
    gates = GATES[operator] * HIDDEN
    stored = {"w": rand(1, gates, FEATURES), "r": rand(1, gates, HIDDEN), "b": rand(1, 2 * gates)}
    node = helper.make_node(operator, ["x", *stored], ["y"], "cells", hidden_size=HIDDEN)
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kind, [length, "N", FEATURES])],
        [helper.make_tensor_value_info("y", kind, [length, 1, "N", HIDDEN])],
        [onnx.numpy_helper.from_array(np.tanh(value), name) for name, value in stored.items()],
    )
    imports = [helper.make_opsetid("", 17)]
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


@pytest.mark.parametrize("operator", GATES)
def test_a_dynamic_length_is_told_with_the_way_out(operator: str, tmp_path: Path) -> None:
    path = recurrent(operator, "T", tmp_path)
    told = (
        rf"(?s){operator} \(version 17\) 'cells': a sequence of dynamic length.*"
        r"Fix sizes \(x: \(T, N, 5\)\) by shapes=.*--shape name=1,3,224,224"
    )
    with pytest.raises(ValueError, match=told):
        sparsify.compile(path, cache=False)


def test_a_fixed_length_keeps_the_batch_dynamic(
    tmp_path: Path, same_as_onnxruntime: Callable[..., None]
) -> None:
    path: Any = recurrent("LSTM", "T", tmp_path)
    shapes = {"x": (4, "N", FEATURES)}
    compiled = sparsify.compile(path, shapes=shapes, cache=False, num_threads=1, strict=True)
    for batch in (1, 3):
        same_as_onnxruntime(compiled, path, {"x": torch.randn(4, batch, FEATURES)}, 1e-5)
