"""What ONNX Runtime's quantiser writes, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.frontend.onnx.one_node import (
    MICROSOFT,
    Array,
    compare,
    imported,
    ints,
    number,
    one_node,
    onnxruntime,
    rand,
)

X_SCALE, Y_SCALE = number(0.031), number(0.047)


def quantised(*shape: int, dtype: Any = np.uint8, seed: int = 0) -> Array:
    info = np.iinfo(dtype)
    return ints(info.min, info.max + 1, *shape, dtype=dtype, seed=seed)


def near(folder: Path, operator: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
    """Equal but for halves, which ONNX Runtime's approximations round either way."""
    model = one_node(operator, inputs, attributes, domain=MICROSOFT)
    given = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
    (expected,), (found,) = onnxruntime(model, given), imported(model, given, folder)
    assert (expected.shape, expected.dtype) == (found.shape, found.dtype)
    difference = np.abs(expected.astype(int) - found.astype(int))
    assert difference.max(initial=0) <= 1 and (difference > 0).mean() < 0.02


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("operator", ["QLinearAdd", "QLinearMul"])
def test_two_operands(tmp_path: Path, operator: str, dtype: Any) -> None:
    a, b = quantised(3, 7, dtype=dtype), quantised(7, dtype=dtype, seed=1)
    zeros = [number(value, dtype) for value in (3, 5, 9)]
    inputs = [a, X_SCALE, zeros[0], b, number(0.012), zeros[1], Y_SCALE, zeros[2]]
    near(tmp_path, operator, inputs, {})


def test_a_zero_point_that_is_left_out_is_zero(tmp_path: Path) -> None:
    zero = number(0, np.int8)
    inputs = [quantised(3, 7, dtype=np.int8), X_SCALE, zero, Y_SCALE, zero]
    results = []
    for given in (inputs, [*inputs[:2], None, Y_SCALE]):
        model = one_node("QLinearLeakyRelu", given, {}, MICROSOFT)
        feeds = {f"x{i}": x for i, x in enumerate(given) if x is not None}
        results += imported(model, feeds, tmp_path)
    assert np.array_equal(*results) and results[0].dtype == np.int8


ONE_OPERAND: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("QLinearSigmoid", {}, (5, 9)),
    ("QLinearLeakyRelu", {"alpha": 0.2}, (5, 9)),
    ("QLinearSoftmax", {"axis": -1, "opset": 13}, (3, 2, 9)),
    ("QLinearSoftmax", {"axis": 1, "opset": 12}, (3, 2, 9)),
    ("QLinearAveragePool", {"kernel_shape": [3, 2], "strides": [2, 1]}, (2, 3, 9, 7)),
    (
        "QLinearAveragePool",
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "channels_last": 1},
        (2, 9, 7, 3),
    ),
    ("QLinearGlobalAveragePool", {"channels_last": 0}, (2, 3, 5, 7)),
    ("QLinearGlobalAveragePool", {"channels_last": 1}, (2, 5, 7, 3)),
]


@pytest.mark.parametrize(("operator", "attributes", "shape"), ONE_OPERAND)
def test_one_operand(
    tmp_path: Path, operator: str, attributes: dict[str, Any], shape: tuple[int, ...]
) -> None:
    probabilities = operator in ("QLinearSigmoid", "QLinearSoftmax")
    scale = number(1 / 256) if probabilities else Y_SCALE
    zeros = [number(value, np.uint8) for value in (113, 0 if probabilities else 98)]
    inputs = [quantised(*shape), X_SCALE, zeros[0], scale, zeros[1]]
    near(tmp_path, operator, inputs, attributes)


def test_concatenation(tmp_path: Path) -> None:
    parts: list[Array] = []
    for size, scale, zero in ((2, 0.03, 7), (5, 0.011, 0), (1, 0.2, 255)):
        parts += [quantised(3, size), number(scale), number(zero, np.uint8)]
    near(tmp_path, "QLinearConcat", [Y_SCALE, number(4, np.uint8), *parts], {"axis": 1})


@pytest.mark.parametrize("quantise", [False, True])
def test_gemm(tmp_path: Path, quantise: bool) -> None:
    scales = np.array([0.01, 0.02, 0.005, 0.03], np.float32)
    inputs: list[Any] = [
        *(quantised(3, 9), X_SCALE, number(120, np.uint8)),
        *(quantised(4, 9, dtype=np.int8), scales, np.zeros(4, np.int8)),
        ints(-900, 900, 4, dtype=np.int32),
    ]
    if quantise:
        inputs += [number(0.4), number(128, np.uint8)]
        near(tmp_path, "QGemm", inputs, {"transB": 1})
    else:
        compare(tmp_path, "QGemm", inputs, {"transB": 1}, domain=MICROSOFT, tolerance=1e-4)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_integers_to_float(tmp_path: Path, columns: bool, constant: bool) -> None:
    scale = np.array([0.01, 0.02, 0.005], np.float32) if columns else number(0.02)
    zero = np.array([3, 0, -7], np.int8) if columns else number(5, np.int8)
    inputs = [
        *(quantised(2, 4, 31), quantised(31, 3, dtype=np.int8), X_SCALE, scale),
        *(number(99, np.uint8), zero, rand(3)),
    ]
    constants = (1, 3, 5, 6) if constant else ()
    options: dict[str, Any] = {"domain": MICROSOFT, "constants": constants, "tolerance": 1e-4}
    compare(tmp_path, "MatMulIntegerToFloat", inputs, {}, **options)


def test_quantised_at_each_call(tmp_path: Path) -> None:
    weight = quantised(31, 3, dtype=np.int8)
    inputs = [rand(2, 4, 31), weight, number(0.02), number(5, np.int8), rand(3)]
    options: dict[str, Any] = {"domain": MICROSOFT, "constants": (1, 2, 3, 4)}
    compare(tmp_path, "DynamicQuantizeMatMul", inputs, {}, tolerance=1e-4, **options)


FEW_BITS = [(2, "none"), (2, "packed"), (4, "none"), (4, "packed"), (4, "float"), (8, "none")]


@pytest.mark.parametrize(("bits", "zeros"), [*FEW_BITS, (8, "packed")])
def test_few_bits(tmp_path: Path, bits: int, zeros: str) -> None:
    outs, ins, block = 5, 75, 32  # the last block is not full
    blocks = -(-ins // block)
    weight = quantised(outs, blocks, block * bits // 8)
    scales = np.abs(rand(outs * blocks)) + 0.1
    inputs: list[Any] = [rand(2, 3, ins), weight, scales]
    if zeros == "packed":
        inputs.append(quantised(outs * -(-blocks * bits // 8), seed=1))
    elif zeros == "float":
        inputs.append(rand(outs, blocks) + 7)
    attributes = {"N": outs, "K": ins, "bits": bits, "block_size": block}
    options: dict[str, Any] = {"domain": MICROSOFT, "constants": range(1, len(inputs))}
    compare(tmp_path, "MatMulNBits", inputs, attributes, tolerance=3e-3, **options)


def test_few_bits_by_hand(tmp_path: Path) -> None:
    """The lowest bits come first; 3 is below the middle, 8."""
    weight = np.zeros((1, 1, 8), np.uint8)
    weight[0, 0, 0] = 0x93
    inputs = [np.eye(2, 16, dtype=np.float32), weight, np.array([0.5], np.float32)]
    attributes = {"N": 1, "K": 16, "bits": 4, "block_size": 16}
    model = one_node("MatMulNBits", inputs, attributes, MICROSOFT, constants=(1, 2))
    (found,) = imported(model, {"x0": inputs[0]}, tmp_path)
    assert found.tolist() == [[-2.5], [0.5]]


@pytest.mark.parametrize("causal", [0, 1])
def test_attention(tmp_path: Path, causal: int) -> None:
    """ONNX Runtime takes constant weights of all columns in one scale."""
    inputs = [
        *(quantised(2, 5, 12), quantised(12, 36, dtype=np.int8), rand(36)),
        *(number(0.02), number(0.01), np.array([3, 5], np.int32)),
        *(number(120, np.uint8), number(0, np.int8)),
    ]
    options: dict[str, Any] = {"domain": MICROSOFT, "constants": (1, 2, 3, 4, 6, 7)}
    attributes = {"num_heads": 3, "unidirectional": causal}
    compare(tmp_path, "QAttention", inputs, attributes, tolerance=1e-4, **options)
