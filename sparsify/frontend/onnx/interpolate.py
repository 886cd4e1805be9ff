"""Where Resize reads: for each element of a result the elements of the input, and their shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sparsify.frontend.onnx.tables import table


@dataclass(frozen=True)
class Sampling:
    """How Resize reads along one dim; the fields are its attributes.

    Attributes:
        roi: beginning and end of what is read, as shares of the dim; for ``tf_crop_and_resize``.
        outside: what is read outside the input with ``tf_crop_and_resize``.
    """

    mode: str = "nearest"
    coordinates: str = "half_pixel"
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    antialias: bool = False
    exclude_outside: bool = False
    roi: tuple[float, float] = (0.0, 1.0)
    outside: float = 0.0

    def resize(self, x: torch.Tensor, dim: int, size: int, scale: float) -> torch.Tensor:
        """A tensor with ``size`` elements along a dim of static size."""
        length = x.shape[dim]
        at = self._places(length, size, scale)
        if self.mode == "nearest":
            indices = np.clip(self._nearest(at), 0, length - 1)
            y = x.index_select(dim, table(indices, torch.int64))
        else:
            y = self._weighted(x, dim, at, scale)
        if self.coordinates != "tf_crop_and_resize":
            return y
        beyond = (at < 0) | (at > length - 1)
        if not beyond.any():
            return y
        return y.masked_fill(table(_along(beyond, dim, x.dim()), torch.bool), self.outside)

    def _places(self, length: int, size: int, scale: float) -> np.ndarray:
        """The place in the input, in elements, of each element of the result."""
        i = np.arange(size, dtype=np.float64)
        whole = scale * length
        if self.coordinates == "align_corners":
            return i * (length - 1) / (whole - 1) if whole != 1 else i * 0
        if self.coordinates == "asymmetric":
            return i / scale
        if self.coordinates == "tf_crop_and_resize":
            start, end = self.roi
            if whole == 1:
                return i * 0 + (start + end) * (length - 1) / 2
            return start * (length - 1) + i * (end - start) * (length - 1) / (whole - 1)
        if self.coordinates == "pytorch_half_pixel" and whole == 1:
            return i * 0 - 0.5
        at = (i + 0.5) / scale - 0.5
        if self.coordinates == "half_pixel_symmetric":
            return at + length / 2 * (1 - size / whole)
        return at

    def _nearest(self, at: np.ndarray) -> np.ndarray:
        rounding: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "round_prefer_floor": lambda x: np.ceil(x - 0.5),
            "round_prefer_ceil": lambda x: np.floor(x + 0.5),
            "floor": np.floor,
            "ceil": np.ceil,
        }
        return rounding[self.nearest](at).astype(np.int64)

    def _weighted(self, x: torch.Tensor, dim: int, at: np.ndarray, scale: float) -> torch.Tensor:
        """A sum over the few elements that each result needs, one gather for each of them."""
        kernel, reach = self._kernel()
        stretch = min(scale, 1.0) if self.antialias else 1.0
        radius = math.ceil(reach / stretch)
        base = np.floor(at).astype(np.int64)
        taps = base[:, None] + np.arange(1 - radius, radius + 1)
        shares = kernel((taps - at[:, None]) * stretch)
        length = x.shape[dim]
        if self.exclude_outside:
            shares = np.where((taps >= 0) & (taps < length), shares, 0)
        if self.exclude_outside or self.antialias:
            shares = shares / shares.sum(1, keepdims=True)
        taps = np.clip(taps, 0, length - 1)
        total = None
        for column in range(taps.shape[1]):
            share = shares[:, column]
            if not share.any():
                continue
            factor = table(_along(share, dim, x.dim()), x.dtype)
            part = x.index_select(dim, table(taps[:, column], torch.int64)) * factor
            total = part if total is None else total + part
        assert total is not None
        return total

    def _kernel(self) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
        """The share of an element by its distance, and beyond which distance it is zero."""
        if self.mode == "linear":
            return lambda x: np.clip(1 - np.abs(x), 0, None), 1
        a = self.cubic

        def cubic(x: np.ndarray) -> np.ndarray:
            x = np.abs(x)
            near = ((a + 2) * x - (a + 3)) * x * x + 1
            far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
            return np.where(x <= 1, near, np.where(x < 2, far, 0))

        return cubic, 2


def _along(values: np.ndarray, dim: int, dims: int) -> np.ndarray:
    return values.reshape((-1,) + (1,) * (dims - dim - 1))
