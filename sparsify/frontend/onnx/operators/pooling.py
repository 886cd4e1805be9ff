"""Pooling over windows: average, maximum, Lp, over all, and taking a maximum back."""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import NeedsSizes, operator
from sparsify.frontend.onnx.sliding import Windows
from sparsify.frontend.onnx.tables import table

_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMUM = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _windows(node: Node, x: torch.Tensor) -> Windows:
    return Windows.of(
        node.require("kernel_shape"),
        tuple(x.shape[2:]),
        strides=node.get("strides"),
        dilations=node.get("dilations"),
        pads=node.get("pads"),
        auto_pad=node.get("auto_pad", "NOTSET"),
        ceil=bool(node.get("ceil_mode", 0)),
    )


def _is_plain(windows: Windows) -> bool:
    """Whether PyTorch's own pooling pads as ONNX does."""
    if not windows.is_symmetric:
        return False
    return all(2 * p <= k for p, k in zip(windows.begin, windows.kernel, strict=True))


@operator("AveragePool")
def average_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    windows, with_padding = _windows(node, x), bool(node.get("count_include_pad", 0))
    whole = set(windows.dilation) == {1}
    if whole and _is_plain(windows) and windows.dims in _AVERAGE and not windows.ceil:
        return _AVERAGE[windows.dims](
            x, windows.kernel, windows.stride, windows.begin, False, with_padding
        )
    return _sum_pool(x, windows) / _counts(windows, x, with_padding)


def _counts(windows: Windows, x: torch.Tensor, with_padding: bool) -> torch.Tensor | float:
    """By how many elements the sum of each window is divided."""
    sizes = tuple(x.shape[2:])
    if not all(isinstance(size, int) for size in sizes):
        if (with_padding or not any((*windows.begin, *windows.end))) and not windows.ceil:
            return float(np.prod(windows.kernel))
        raise NeedsSizes(f"padding that is not counted, over dynamic sizes {sizes}")
    counts = windows.inside(sizes, with_padding)
    if (counts == counts.flat[0]).all():
        return float(counts.flat[0])
    return table(counts, x.dtype)


def _sum_pool(x: torch.Tensor, windows: Windows) -> torch.Tensor:
    if set(windows.dilation) == {1} and windows.dims in _AVERAGE:
        padded = windows.pad(x)
        area = float(np.prod(windows.kernel))
        return _AVERAGE[windows.dims](padded, windows.kernel, windows.stride) * area
    return reduce(torch.add, windows.taps(x))


@operator("MaxPool")
def max_pool(node: Node, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    windows = _windows(node, x)
    if node.wants(1):
        return _with_indices(node, x, windows)
    if windows.dims not in _MAXIMUM or not x.dtype.is_floating_point:
        return reduce(torch.maximum, windows.taps(x, _lowest(x.dtype)))
    compute = _MAXIMUM[windows.dims]
    if _is_plain(windows) and not windows.ceil:
        return compute(x, windows.kernel, windows.stride, windows.begin, windows.dilation)
    padded = windows.pad(x, float("-inf"))
    return compute(padded, windows.kernel, windows.stride, 0, windows.dilation)


def _lowest(dtype: torch.dtype) -> float | int:
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def _with_indices(
    node: Node, x: torch.Tensor, windows: Windows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Also where each maximum is in the whole flat input, columns first if so asked."""
    sizes = tuple(x.shape[2:])
    order = range(len(sizes)) if not node.get("storage_order", 0) else reversed(range(len(sizes)))
    strides, step = [0] * len(sizes), 1
    for dim in reversed(list(order)):
        strides[dim], step = step, step * sizes[dim]
    place = torch.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *(1,) * len(sizes)) * step
    for dim, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        shape = [1] * (len(sizes) + 2)
        shape[dim + 2] = size
        place = place + torch.arange(size).reshape(shape) * stride
    taps = torch.stack(windows.taps(x, _lowest(x.dtype)))
    places = torch.stack(windows.taps(place, -1))
    chosen = taps.argmax(0, keepdim=True)
    return taps.gather(0, chosen).squeeze(0), places.gather(0, chosen).squeeze(0)


@operator("LpPool")
def lp_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    p = float(node.get("p", 2))
    return _sum_pool(x.abs() ** p, _windows(node, x)) ** (1 / p)


@operator("GlobalLpPool")
def global_lp_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    p = float(node.get("p", 2))
    total = (x.abs() ** p).sum(tuple(range(2, x.dim())), keepdim=True)
    return total ** (1 / p)


@operator("MaxUnpool", host=("shape",))
def max_unpool(
    node: Node, x: torch.Tensor, indices: torch.Tensor, shape: np.ndarray | None = None
) -> torch.Tensor:
    kernel = node.require("kernel_shape")
    strides, pads = node.get("strides", [1] * len(kernel)), node.get("pads", [0] * 2 * len(kernel))
    natural = [
        (size - 1) * s - pads[i] - pads[i + len(kernel)] + k
        for i, (size, s, k) in enumerate(zip(x.shape[2:], strides, kernel, strict=True))
    ]
    length = x.shape[0] * x.shape[1]
    for size in natural:
        length = length * size
    flat = torch.zeros(length, dtype=x.dtype)
    y = flat.scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(*x.shape[:2], *natural)
    if shape is None:
        return y
    # Indices count in the natural shape; a larger one has zeros after it.
    rest = [int(want) - have for want, have in zip(shape[2:], natural, strict=True)]
    return F.pad(y, [amount for r in reversed(rest) for amount in (0, r)])
