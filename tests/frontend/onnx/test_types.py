"""Element types that are kept in others: half floats in float32, few bits in 8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import sparsify
from sparsify.frontend.onnx.capture import capture_onnx
from tests.frontend.onnx.one_node import Array, imported, one_node, onnxruntime, rand

HALF = """
g (float16[N, 8] x) => (float16[N, 6] y, float[N, 6] z) {
    h = MatMul(x, w)
    a = Add(h, b)
    y = Tanh(a)
    z = Cast <to = 1> (y)
}"""


@pytest.fixture
def half(write: Callable[..., Path]) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file of half floats throughout, and its weights."""
    path = write(HALF)
    model = onnx.load(path)
    weights = {"w": torch.randn(8, 6).half() / 4, "b": torch.randn(6).half()}
    stored = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in weights.items()]
    model.graph.initializer.extend(stored)
    onnx.save(model, path)
    return path, weights


def test_half_floats_are_computed_in_float32(
    half: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    """Weights exactly those of the file; rounding where a half float leaves the model alone."""
    path, weights = half
    exported = capture_onnx(path)
    held = [v.dtype for v in exported.state_dict.values()]
    assert set(held) == {torch.float32}
    x = torch.randn(5, 8).half()
    expected = torch.tanh(x.float() @ weights["w"].float() + weights["b"].float())
    found = exported.module()(x)
    assert found["y"].dtype == torch.float16 and found["z"].dtype == torch.float32
    torch.testing.assert_close(found["z"], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["y"].float(), expected, atol=5e-4, rtol=0)


def test_a_file_of_half_floats_is_compiled(half: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = half
    compiled = sparsify.compile(path, strict=True)
    x = torch.randn(7, 8).half()
    found = compiled(x)
    (y, z) = onnxruntime(onnx.load(path), {"x": x.numpy()})
    assert found["y"].dtype == torch.float16
    np.testing.assert_allclose(found["y"].numpy(), y, atol=2e-3)
    np.testing.assert_allclose(found["z"].numpy(), z, atol=2e-3)


def test_weights_of_float64_are_refused_with_the_rule(write: Callable[..., Path]) -> None:
    path = write("g (double[N, 2] x) => (double[N, 2] y) <double[2] w = {1.0, 2.0}> "
                 "{ y = Mul(x, w) }")  # fmt: skip
    with pytest.raises(ValueError, match=r"'w' of shape \(2,\) is torch.float64.*in float32"):
        capture_onnx(path)


BITS = {TensorProto.INT4: (-8, 7), TensorProto.UINT4: (0, 15)}


@pytest.mark.parametrize("code", BITS)
def test_weights_of_four_bits(tmp_path: Path, code: int) -> None:
    """In blocks along a dim, each with its scale and zero point."""
    low, high = BITS[code]
    numbers = np.random.default_rng(3).integers(low, high + 1, (32, 5))
    zeros = np.array([[low, high, 0, 1, 2], [3, low, 1, 0, high]])
    scales = np.abs(rand(2, 5)) + 0.1
    stored = [helper.make_tensor(n, code, v.shape, v.flatten()) for n, v in
              (("q", numbers), ("zero", zeros))]  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node(
                "DequantizeLinear", ["q", "scale", "zero"], ["w"], axis=0, block_size=16
            ),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 5])],
        [*stored, numpy_helper.from_array(scales, "scale")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = rand(3, 32)
    wide = (numbers - zeros.repeat(16, 0)) * scales.repeat(16, 0)
    (found,) = imported(model, {"x": x}, tmp_path)
    np.testing.assert_allclose(found, x @ wide.astype(np.float32), rtol=1e-4, atol=1e-3)
    # Of other numbers ONNX Runtime computes the product in 8 bits.
    ones = {"x": np.eye(3, 32, dtype=np.float32)}
    (found,) = imported(model, ones, tmp_path)
    np.testing.assert_allclose(found, onnxruntime(model, ones)[0], rtol=1e-5, atol=1e-5)


def test_a_range_of_four_bits_saturates(tmp_path: Path) -> None:
    """The zero point's type says how far the result may go, although it is kept in 8 bits."""
    inputs: list[Any] = [np.array([-100, -3, 0, 4, 100], np.float32), np.array(0.5, np.float32)]
    model = one_node("QuantizeLinear", [*inputs, np.array(0, np.int8)], {}, constants=(2,))
    zero = helper.make_tensor("x2", TensorProto.INT4, [], [1])
    del model.graph.initializer[:]
    model.graph.initializer.append(zero)
    given: dict[str, Array] = {"x0": inputs[0], "x1": inputs[1]}
    (found,) = imported(model, given, tmp_path)
    assert found.tolist() == [-8, -5, 1, 7, 7]
