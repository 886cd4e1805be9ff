"""Handlers against ONNX Runtime and onnx.reference: random inputs, odd sizes, few attributes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.frontend.onnx.one_node import (
    Array,
    compare,
    ints,
    number,
    onnxruntime,
    rand,
    reference,
)

POOLS = [
    ("AveragePool", {"kernel_shape": [3, 2]}),
    ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 0, 2, 1], "strides": [2, 3]}),
    ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("AveragePool", {"kernel_shape": [2, 4], "ceil_mode": 1, "strides": [3, 2]}),
    ("AveragePool", {"kernel_shape": [2, 3], "auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    ("MaxPool", {"kernel_shape": [3, 2]}),
    ("MaxPool", {"kernel_shape": [3, 3], "dilations": [2, 1], "strides": [2, 2]}),
    ("MaxPool", {"kernel_shape": [3, 2], "pads": [2, 0, 0, 1], "ceil_mode": 1, "strides": [2, 3]}),
    ("MaxPool", {"kernel_shape": [3, 4], "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("LpPool", {"kernel_shape": [3, 2], "strides": [2, 1]}),
    ("LpPool", {"kernel_shape": [2, 2], "p": 3, "pads": [1, 0, 0, 1]}),
    ("GlobalLpPool", {"p": 3}),
]


@pytest.mark.parametrize(("operator", "attributes"), POOLS)
def test_pooling(tmp_path: Path, operator: str, attributes: dict[str, Any]) -> None:
    compare(tmp_path, operator, [rand(2, 3, 11, 9)], attributes, tolerance=1e-4)


def test_max_pool_tells_where(tmp_path: Path) -> None:
    attributes = {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}
    compare(tmp_path, "MaxPool", [rand(2, 3, 7, 9)], attributes, outputs=2)


TRANSPOSED = [
    {},
    {"strides": [2, 3]},
    {"strides": [2, 2], "pads": [1, 0, 0, 1]},
    {"strides": [3, 2], "output_padding": [1, 1], "dilations": [2, 1]},
    {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
    {"strides": [2, 2], "output_shape": [11, 14]},
    {"group": 2},
]


@pytest.mark.parametrize("attributes", TRANSPOSED)
def test_conv_transpose(tmp_path: Path, attributes: dict[str, Any]) -> None:
    out = 3 // attributes.get("group", 1) or 1
    inputs = [rand(1, 4, 5, 7), rand(4, out, 3, 2), rand(out * attributes.get("group", 1))]
    compare(tmp_path, "ConvTranspose", inputs, attributes, tolerance=1e-4)


RECURRENT = [
    (operator, direction, options)
    for operator in ("RNN", "GRU", "LSTM")
    for direction, options in (
        ("forward", {}),
        ("reverse", {"clip": 0.5}),
        ("bidirectional", {}),
    )
]


@pytest.mark.parametrize(("operator", "direction", "options"), RECURRENT)
@pytest.mark.parametrize("lengths", [False, True])
def test_recurrent(
    tmp_path: Path, operator: str, direction: str, options: dict[str, Any], lengths: bool
) -> None:
    steps, batch, features, hidden = 5, 3, 4, 7
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[operator]
    ways = 2 if direction == "bidirectional" else 1
    inputs = [
        rand(steps, batch, features),
        rand(ways, gates * hidden, features),
        rand(ways, gates * hidden, hidden),
        rand(ways, 2 * gates * hidden),
        np.array([5, 2, 3], np.int32) if lengths else None,
        rand(ways, batch, hidden),
    ]
    attributes = {"hidden_size": hidden, "direction": direction, **options}
    outputs = 3 if operator == "LSTM" else 2
    compare(
        tmp_path, operator, inputs, attributes, outputs=outputs, tolerance=1e-4, constants=(1, 2, 3)
    )


def test_gru_that_resets_after_the_product(tmp_path: Path) -> None:
    inputs = [rand(4, 2, 3), rand(1, 15, 3), rand(1, 15, 5), rand(1, 30)]
    compare(tmp_path, "GRU", inputs, {"hidden_size": 5, "linear_before_reset": 1}, outputs=2)


def test_lstm_with_peepholes_and_other_activations(tmp_path: Path) -> None:
    inputs = [rand(4, 2, 3), rand(1, 20, 3), rand(1, 20, 5), None, None, None, None, rand(1, 15)]
    attributes = {"hidden_size": 5, "activations": ["HardSigmoid", "Softsign", "Tanh"]}
    attributes |= {"activation_alpha": [0.3], "activation_beta": [0.4]}
    compare(tmp_path, "LSTM", inputs, attributes, outputs=3)


RESIZES = [
    (mode, coordinates)
    for mode in ("nearest", "linear", "cubic")
    for coordinates in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
]


@pytest.mark.parametrize(("mode", "coordinates"), RESIZES)
@pytest.mark.parametrize("scales", [[1.0, 1.0, 1.7, 2.0], [1.0, 1.0, 0.6, 0.4]])
def test_resize(tmp_path: Path, mode: str, coordinates: str, scales: list[float]) -> None:
    inputs = [rand(1, 2, 7, 10), np.zeros(0, np.float32), np.array(scales, np.float32)]
    attributes = {"mode": mode, "coordinate_transformation_mode": coordinates}
    # With corners aligned, ONNX Runtime rounds the size down first, ONNX itself does not.
    peer = reference if coordinates == "align_corners" else onnxruntime
    compare(tmp_path, "Resize", inputs, attributes, peer, constants=(1, 2), tolerance=1e-4)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resize_without_aliases(tmp_path: Path, mode: str) -> None:
    inputs = [rand(1, 1, 12, 9), None, None, np.array([1, 1, 5, 4])]
    attributes = {"mode": mode, "antialias": 1}
    compare(tmp_path, "Resize", inputs, attributes, constants=(3,), tolerance=1e-4)


@pytest.mark.parametrize(
    "modes", [("linear", "zeros"), ("nearest", "border"), ("cubic", "reflection")]
)
def test_grid_sample(tmp_path: Path, modes: tuple[str, str]) -> None:
    attributes = {"mode": modes[0], "padding_mode": modes[1]}
    compare(
        tmp_path, "GridSample", [rand(2, 3, 5, 7), rand(2, 4, 6, 2)], attributes, tolerance=1e-4
    )


def quantised() -> list[Array]:
    return [
        *(ints(0, 255, 5, 7, dtype=np.uint8), number(0.03), number(130, np.uint8)),
        *(ints(-120, 120, 7, 9, dtype=np.int8), number(0.02), number(3, np.int8)),
        *(number(0.5), number(17, np.uint8)),
    ]


def test_quantised_products(tmp_path: Path) -> None:
    compare(tmp_path, "QLinearMatMul", quantised(), {}, constants=(1, 2, 4, 5, 6, 7))
    a, _, a_zero, b, _, b_zero, *_ = quantised()
    compare(tmp_path, "MatMulInteger", [a, b, a_zero, b_zero], {}, constants=(2, 3))


def test_integer_convolution_is_exact(tmp_path: Path) -> None:
    x = ints(0, 255, 1, 40, 9, 8, dtype=np.uint8)
    weight = ints(0, 255, 6, 40, 3, 3, dtype=np.uint8)
    zeros = [number(7, np.uint8), number(128, np.uint8)]
    compare(tmp_path, "ConvInteger", [x, weight, *zeros], {"pads": [1, 1, 1, 1]}, constants=(2, 3))


SCATTERS = [
    ("ScatterElements", {"axis": 1}, [rand(3, 5), ints(-5, 5, 3, 1), rand(3, 1)]),
    (
        "ScatterElements",
        {"axis": 0, "reduction": "add"},
        [rand(4, 3), ints(0, 4, 6, 3), rand(6, 3)],
    ),
    ("ScatterND", {}, [rand(5, 4, 3), np.array([[4], [-3], [0]]), rand(3, 4, 3)]),
    ("ScatterND", {"reduction": "mul"}, [rand(5, 4), np.array([[4, 1], [0, 3]]), rand(2)]),
]


@pytest.mark.parametrize(("operator", "attributes", "inputs"), SCATTERS)
def test_scatter(
    tmp_path: Path, operator: str, attributes: dict[str, Any], inputs: list[Array]
) -> None:
    compare(tmp_path, operator, inputs, attributes, version=18)


SELECTIONS = [
    ("TopK", {}, [rand(3, 9), np.array([4])], 2, (1,)),
    ("TopK", {"largest": 0, "axis": 0}, [rand(7, 3), np.array([5])], 2, (1,)),
    ("OneHot", {}, [ints(-4, 4, 3, 2), number(4, np.int64), rand(2)], 1, (1,)),
    ("OneHot", {"axis": 1}, [ints(0, 5, 2, 3), number(5, np.int64), rand(2)], 1, (1,)),
    ("ReverseSequence", {}, [rand(5, 3, 2), np.array([5, 1, 3])], 1, ()),
    ("EyeLike", {"k": -1}, [rand(4, 5)], 1, ()),
    ("DepthToSpace", {"blocksize": 2}, [rand(1, 8, 3, 5)], 1, ()),
    ("DepthToSpace", {"blocksize": 3, "mode": "CRD"}, [rand(2, 18, 2, 1)], 1, ()),
    ("SpaceToDepth", {"blocksize": 2}, [rand(1, 3, 4, 6)], 1, ()),
    ("Einsum", {"equation": "bij, jk -> bik"}, [rand(2, 3, 4), rand(4, 5)], 1, ()),
    ("Det", {}, [rand(2, 4, 4)], 1, ()),
]


@pytest.mark.parametrize(("operator", "attributes", "inputs", "outputs", "constants"), SELECTIONS)
def test_selection_and_rearrangement(
    tmp_path: Path,
    operator: str,
    attributes: dict[str, Any],
    inputs: list[Array],
    outputs: int,
    constants: tuple[int, ...],
) -> None:
    compare(
        tmp_path, operator, inputs, attributes, outputs=outputs, constants=constants, tolerance=1e-4
    )


SPECTRA = [
    ("DFT", {}, [rand(2, 15, 1), None], ()),
    ("DFT", {"onesided": 1}, [rand(2, 12, 1), None], ()),
    ("DFT", {"inverse": 1}, [rand(2, 7, 2), None], ()),
    ("STFT", {}, [rand(1, 64, 1), number(8, np.int64), rand(16)], (1,)),
]


@pytest.mark.parametrize(("operator", "attributes", "inputs", "constants"), SPECTRA)
def test_spectra(
    tmp_path: Path,
    operator: str,
    attributes: dict[str, Any],
    inputs: list[Array | None],
    constants: tuple[int, ...],
) -> None:
    compare(tmp_path, operator, inputs, attributes, constants=constants, tolerance=1e-4)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("operator", ["NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"])
def test_losses(tmp_path: Path, operator: str, reduction: str) -> None:
    inputs = [rand(3, 5, 2), ints(0, 5, 3, 2), np.abs(rand(5))]
    compare(tmp_path, operator, inputs, {"reduction": reduction, "ignore_index": 2}, peer=reference)


def deformable() -> list[Array]:
    offsets = np.random.default_rng(3).uniform(-2, 2, (1, 36, 5, 6)).astype(np.float32)
    return [rand(1, 4, 7, 8), rand(6, 4, 3, 3), offsets, rand(6)]


def test_deformable_convolution(tmp_path: Path) -> None:
    compare(tmp_path, "DeformConv", deformable(), {"offset_group": 2}, peer=reference, version=22)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align(tmp_path: Path, mode: str) -> None:
    rois = np.array([[0, 0, 5.5, 6], [2.25, 1, 8, 3]], np.float32)
    attributes = {"output_height": 3, "output_width": 2, "sampling_ratio": 2, "mode": mode}
    inputs = [rand(2, 3, 9, 8), rois, np.array([1, 0])]
    compare(tmp_path, "RoiAlign", inputs, attributes, version=16, tolerance=1e-4)
