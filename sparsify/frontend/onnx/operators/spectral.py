"""Fourier transforms as products with tables of cosines, windows, and the Mel scale."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import NeedsSizes, Unsupported, operator
from sparsify.frontend.onnx.tables import table
from sparsify.frontend.onnx.tensors import computed_type


def _tables(
    rows: int, columns: int, size: int, sign: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``cos`` and ``sin`` of ``sign * 2 pi row column / size``."""
    angle = np.outer(np.arange(rows), np.arange(columns)) % size * (sign * 2 * math.pi / size)
    return table(np.cos(angle), dtype), table(np.sin(angle), dtype)


def _transform(
    x: torch.Tensor, axis: int, length: int, onesided: bool, inverse: bool
) -> torch.Tensor:
    """A DFT along a dim of ``[..., 1 or 2]``, real or complex numbers; ``[..., 2]``.

    With ``onesided`` the first half of it, or, inverse, real numbers from the first half.
    """
    x = x.movedim(axis, -2)
    given = length // 2 + 1 if onesided and inverse else length
    size = x.shape[-2]
    if not isinstance(size, int):
        raise NeedsSizes(f"a transform over a dynamic dim {size}")
    if size > given:
        x = x[..., :given, :]
    used = min(size, given)
    if onesided and inverse:
        cos, sin = _tables(length, used, length, 1.0, x.dtype)
        share = np.full(used, 2.0)
        share[0] = 1.0
        if length % 2 == 0 and used == length // 2 + 1:
            share[-1] = 1.0
        shares = table(share / length, x.dtype)
        y = (x[..., 0] @ (cos * shares).T - x[..., 1] @ (sin * shares).T).unsqueeze(-1)
        return y.movedim(-2, axis)
    count = length // 2 + 1 if onesided else length
    cos, sin = _tables(count, used, length, 1.0 if inverse else -1.0, x.dtype)
    if inverse:
        cos, sin = cos / length, sin / length
    real = x[..., 0]
    if x.shape[-1] == 1:
        parts = [real @ cos.T, real @ sin.T]
    else:
        imaginary = x[..., 1]
        parts = [real @ cos.T - imaginary @ sin.T, real @ sin.T + imaginary @ cos.T]
    return torch.stack(parts, -1).movedim(-2, axis)


@operator("DFT", since=17, host=("length",))
def dft_by_attribute(node: Node, x: torch.Tensor, length: np.ndarray | None = None) -> torch.Tensor:
    return _dft(node, x, length, node.get("axis", 1))


@operator("DFT", since=20, host=("length", "axis"))
def dft(
    node: Node,
    x: torch.Tensor,
    length: np.ndarray | None = None,
    axis: np.ndarray | None = None,
) -> torch.Tensor:
    return _dft(node, x, length, -2 if axis is None else int(axis.reshape(-1)[0]))


def _dft(node: Node, x: torch.Tensor, length: np.ndarray | None, axis: int) -> torch.Tensor:
    onesided, inverse = bool(node.get("onesided", 0)), bool(node.get("inverse", 0))
    axis %= x.dim()
    size = x.shape[axis]
    count = length.reshape(-1)[0] if length is not None else size
    if length is None and onesided and inverse:
        count = 2 * (size - 1)
    return _transform(x, axis, _static(count), onesided, inverse)


def _static(count: Any) -> int:
    if isinstance(count, torch.SymInt):
        raise NeedsSizes(f"a transform of dynamic length {count}")
    return int(count)


@operator("STFT", since=17, host=("frame_step", "frame_length"))
def stft(
    node: Node,
    signal: torch.Tensor,
    frame_step: np.ndarray,
    window: torch.Tensor | None = None,
    frame_length: np.ndarray | None = None,
) -> torch.Tensor:
    step = _static(frame_step.reshape(-1)[0])
    if frame_length is not None:
        length = _static(frame_length.reshape(-1)[0])
    elif window is not None:
        length = window.shape[0]
    else:
        raise Unsupported("neither a window nor a frame length is given")
    if signal.dim() == 2:
        signal = signal.unsqueeze(-1)
    # [batch, samples, parts] -> [batch, frames, parts, length]
    frames = signal.unfold(1, length, step).transpose(2, 3)
    if window is not None:
        frames = frames * window.unsqueeze(-1)
    return _transform(frames, 2, length, bool(node.get("onesided", 1)), False)


def _cosines(node: Node, size: np.ndarray, terms: tuple[float, ...]) -> torch.Tensor:
    """A window that is a sum of cosines."""
    count = _static(size.reshape(-1)[0])
    steps = count if node.get("periodic", 1) else count - 1
    angle = np.arange(count) * (2 * math.pi / max(steps, 1))
    total = sum((-1) ** i * term * np.cos(i * angle) for i, term in enumerate(terms))
    return table(total, computed_type(node.get("output_datatype", 1)))


@operator("HannWindow", since=17, host=("size",))
def hann_window(node: Node, size: np.ndarray) -> torch.Tensor:
    return _cosines(node, size, (0.5, 0.5))


@operator("HammingWindow", since=17, host=("size",))
def hamming_window(node: Node, size: np.ndarray) -> torch.Tensor:
    return _cosines(node, size, (25 / 46, 21 / 46))


@operator("BlackmanWindow", since=17, host=("size",))
def blackman_window(node: Node, size: np.ndarray) -> torch.Tensor:
    return _cosines(node, size, (0.42, 0.5, 0.08))


@operator(
    "MelWeightMatrix", since=17, host=("bands", "dft_length", "sample_rate", "lowest", "highest")
)
def mel_weight_matrix(
    node: Node,
    bands: np.ndarray,
    dft_length: np.ndarray,
    sample_rate: np.ndarray,
    lowest: np.ndarray,
    highest: np.ndarray,
) -> torch.Tensor:
    count, length = int(bands), int(dft_length)
    low, high = (2595 * math.log10(1 + float(f) / 700) for f in (lowest, highest))
    mel = np.arange(count + 2) * ((high - low) / (count + 2)) + low
    bins = np.floor((length + 1) * (700 * (10 ** (mel / 2595) - 1)) / int(sample_rate))
    weights = np.zeros((length // 2 + 1, count))
    for i in range(count):
        left, centre, right = bins[i : i + 3].astype(int)
        if centre == left:
            weights[centre, i] = 1
        for row in range(left, centre + 1 if centre > left else left):
            weights[row, i] = (row - left) / (centre - left)
        for row in range(centre, right):
            weights[row, i] = (right - row) / (right - centre)
    return table(weights, computed_type(node.get("output_datatype", 1)))
