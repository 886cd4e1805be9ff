"""Sliding windows: kernel, strides, dilations and padding as convolution and pooling share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Extent = Any
"""An int, or a torch.SymInt where a dim is dynamic."""


@dataclass(frozen=True)
class Windows:
    """Where windows lie along each spatial dim; all sequences have one entry a dim.

    Attributes:
        kernel: taps of a window.
        begin, end: padding on either side.
        ceil: a last window may hang over the end, if it begins before it.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    begin: tuple[Extent, ...]
    end: tuple[Extent, ...]
    ceil: bool = False

    @classmethod
    def of(
        cls,
        kernel: Sequence[int],
        sizes: Sequence[Extent],
        *,
        strides: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        auto_pad: str = "NOTSET",
        ceil: bool = False,
    ) -> Windows:
        """From a node's attributes; ``sizes`` are the spatial dims of the input.

        Raises:
            ValueError: the number of strides, dilations or pads does not fit, or the way to pad
                is unknown.
        """
        dims = len(kernel)
        stride = tuple(strides or (1,) * dims)
        dilation = tuple(dilations or (1,) * dims)
        pads = tuple(pads or (0,) * (2 * dims))
        if not (len(stride) == len(dilation) == len(sizes) == dims and len(pads) == 2 * dims):
            raise ValueError(
                f"kernel {tuple(kernel)}, strides {stride}, dilations {dilation} and pads {pads} "
                f"do not fit {len(sizes)} spatial dims"
            )
        begin, end = pads[:dims], pads[dims:]
        if auto_pad == "VALID":
            begin = end = (0,) * dims
        elif auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            sums = [
                _same_padding(size, k, s, d)
                for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
            ]
            less, more = tuple(t // 2 for t in sums), tuple(t - t // 2 for t in sums)
            begin, end = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
        elif auto_pad != "NOTSET":
            raise ValueError(f"auto_pad={auto_pad!r} is unknown")
        return cls(tuple(kernel), stride, dilation, begin, end, ceil)

    @property
    def dims(self) -> int:
        return len(self.kernel)

    @property
    def is_symmetric(self) -> bool:
        """Whether both sides of each dim are padded alike, by constants."""
        pads = (*self.begin, *self.end)
        return all(isinstance(p, int) and p >= 0 for p in pads) and self.begin == self.end

    def counts(self, sizes: Sequence[Extent]) -> tuple[Extent, ...]:
        """The number of windows along each dim."""
        return tuple(self._count(i, size) for i, size in enumerate(sizes))

    def _count(self, i: int, size: Extent) -> Extent:
        room = size + self.begin[i] + self.end[i] - (self.dilation[i] * (self.kernel[i] - 1) + 1)
        stride = self.stride[i]
        if not self.ceil:
            return room // stride + 1
        count = (room + stride - 1) // stride + 1
        # A window that would begin in the padding after the end does not count.
        return count - 1 if (count - 1) * stride >= size + self.begin[i] else count

    def pad(self, x: torch.Tensor, value: float | int = 0) -> torch.Tensor:
        """Pads the last dims such that all windows lie inside."""
        sizes = x.shape[-self.dims :]
        ends = []
        for i, (size, count) in enumerate(zip(sizes, self.counts(sizes), strict=True)):
            reach = (count - 1) * self.stride[i] + self.dilation[i] * (self.kernel[i] - 1) + 1
            ends.append(
                max(reach - size - self.begin[i], self.end[i]) if self.ceil else self.end[i]
            )
        pads = [p for pair in zip(self.begin, ends, strict=True) for p in pair]
        if all(isinstance(p, int) and p == 0 for p in pads):
            return x
        flat = [p for i in reversed(range(self.dims)) for p in pads[2 * i : 2 * i + 2]]
        return F.pad(x, flat, value=value)

    def taps(self, x: torch.Tensor, value: float | int = 0) -> list[torch.Tensor]:
        """For each tap of the kernel the elements that the windows have there, ``[..., *counts]``.

        Args:
            value: of the padding.
        """
        counts = self.counts(x.shape[-self.dims :])
        padded = self.pad(x, value)
        found = []
        for offsets in product(*map(range, self.kernel)):
            part = padded
            for i, offset in enumerate(offsets):
                start = offset * self.dilation[i]
                stop = start + (counts[i] - 1) * self.stride[i] + 1
                dim = x.dim() - self.dims + i
                part = part[(slice(None),) * dim + (slice(start, stop, self.stride[i]),)]
            found.append(part)
        return found

    def inside(self, sizes: Sequence[int], with_padding: bool) -> np.ndarray:
        """How many taps of each window lie on the input, or on it and its padding: ``[*counts]``.

        Sizes must be static. What a window hangs over the end because of ``ceil`` is no padding.
        """
        total = np.ones((), np.int64)
        for i, (size, count) in enumerate(zip(sizes, self.counts(sizes), strict=True)):
            first = np.arange(count) * self.stride[i] - self.begin[i]
            at = first[:, None] + np.arange(self.kernel[i]) * self.dilation[i]
            low, high = (-self.begin[i], size + self.end[i]) if with_padding else (0, size)
            total = np.multiply.outer(total, ((at >= low) & (at < high)).sum(1))
        return total


def _same_padding(size: Extent, kernel: int, stride: int, dilation: int) -> Extent:
    """Padding of both sides together that gives ``ceil(size / stride)`` windows."""
    reach = dilation * (kernel - 1) + 1
    if stride == 1:
        return reach - 1
    return max((-(-size // stride) - 1) * stride + reach - size, 0)
