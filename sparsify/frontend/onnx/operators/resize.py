"""Resize and Upsample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sparsify.frontend.onnx.interpolate import Sampling
from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import NeedsSizes, Unsupported, operator

_LARGEST_DENOMINATOR: Final = 2**10


@operator("Upsample", since=7)
def upsample_by_attribute(node: Node, x: torch.Tensor) -> torch.Tensor:
    return _upsample(node, x, node.require("scales"))


@operator("Upsample", since=9, host=("scales",))
@operator("Resize", since=10, host=("scales",))
def upsample(node: Node, x: torch.Tensor, scales: np.ndarray) -> torch.Tensor:
    return _upsample(node, x, scales.tolist())


def _upsample(node: Node, x: torch.Tensor, scales: Sequence[float]) -> torch.Tensor:
    mode = node.get("mode", "nearest")
    sampling = Sampling("linear" if "linear" in mode else mode, "asymmetric", "floor")
    sizes = [_scaled(size, scale) for size, scale in zip(x.shape, scales, strict=True)]
    return _resize(x, list(range(x.dim())), sizes, scales, [sampling] * x.dim())


@operator("Resize", since=11, host=("roi", "scales", "sizes"))
def resize(
    node: Node,
    x: torch.Tensor,
    roi: np.ndarray | None = None,
    scales: np.ndarray | None = None,
    sizes: np.ndarray | None = None,
) -> torch.Tensor:
    axes = [a % x.dim() for a in node.get("axes", range(x.dim()))]
    lengths = [x.shape[a] for a in axes]
    if scales is not None and scales.size:
        factors = scales.tolist()
        wanted = [_scaled(n, f) for n, f in zip(lengths, factors, strict=True)]
    elif sizes is not None and sizes.size:
        wanted = [n if isinstance(n, torch.SymInt) else int(n) for n in sizes.flat]
        factors = [_ratio(w, n) for w, n in zip(wanted, lengths, strict=True)]
        policy = node.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            factor = min(factors) if policy == "not_larger" else max(factors)
            factors = [factor] * len(axes)
            wanted = [int(factor * n + 0.5) for n in lengths]
    else:
        raise Unsupported("neither scales nor sizes are given")
    ranges = [(0.0, 1.0)] * len(axes)
    if roi is not None and roi.size:
        ranges = list(zip(roi[: len(axes)].tolist(), roi[len(axes) :].tolist(), strict=True))
    samplings = [
        Sampling(
            node.get("mode", "nearest"),
            node.get("coordinate_transformation_mode", "half_pixel"),
            node.get("nearest_mode", "round_prefer_floor"),
            node.get("cubic_coeff_a", -0.75),
            bool(node.get("antialias", 0)),
            bool(node.get("exclude_outside", 0)),
            range_,
            node.get("extrapolation_value", 0.0),
        )
        for range_ in ranges
    ]
    return _resize(x, axes, wanted, factors, samplings)


def _resize(
    x: torch.Tensor,
    axes: Sequence[int],
    sizes: Sequence[Any],
    scales: Sequence[Any],
    samplings: Sequence[Sampling],
) -> torch.Tensor:
    """Along each axis in turn, those left out that stay as they are."""
    changed = [
        (axis, size, scale, sampling)
        for axis, size, scale, sampling in zip(axes, sizes, scales, samplings, strict=True)
        if sampling.coordinates == "tf_crop_and_resize" or not _same(x.shape[axis], size, scale)
    ]
    if not changed:
        return x
    if not all(isinstance(n, int) for axis, size, *_ in changed for n in (x.shape[axis], size)):
        return _dynamic(x, changed)
    if changed[0][3].mode == "nearest" and _is_repeat(x, changed):
        return _repeat(x, changed)
    dtype = x.dtype
    y = x if dtype.is_floating_point or changed[0][3].mode == "nearest" else x.float()
    for axis, size, scale, sampling in changed:
        y = sampling.resize(y, axis, size, scale)
    if y.dtype == dtype:
        return y
    info = torch.iinfo(dtype)
    return y.round().clamp(info.min, info.max).to(dtype)


def _same(length: Any, size: Any, scale: Any) -> bool:
    same = isinstance(scale, int | float) and math.isclose(scale, 1.0)
    return same and statically_known_true(length == size)


def _ratio(size: Any, length: Any) -> Any:
    return 1.0 if statically_known_true(size == length) else size / length


def _is_repeat(x: torch.Tensor, changed: Sequence[Any]) -> bool:
    """Whether a picture's elements are repeated a whole number of times."""
    if x.dim() != 4 or any(axis < 2 for axis, *_ in changed):
        return False
    return all(
        size % x.shape[axis] == 0
        and math.isclose(size / x.shape[axis], scale)
        and np.array_equal(
            np.clip(s._nearest(s._places(x.shape[axis], size, scale)), 0, x.shape[axis] - 1),
            np.arange(size) // (size // x.shape[axis]),
        )
        for axis, size, scale, s in changed
    )


def _repeat(x: torch.Tensor, changed: Sequence[Any]) -> torch.Tensor:
    sizes = list(x.shape[2:])
    for axis, size, *_ in changed:
        sizes[axis - 2] = size
    return F.interpolate(x, size=sizes, mode="nearest")


def _dynamic(x: torch.Tensor, changed: Sequence[Any]) -> torch.Tensor:
    """A picture of dynamic size, in the ways in which PyTorch resizes."""
    sampling = changed[0][3]
    corners = sampling.coordinates == "align_corners"
    given = [scale for _, _, scale, _ in changed if isinstance(scale, int | float)]
    whole = all(float(scale).is_integer() for scale in given)
    # Middles of repeated pixels round to the pixel, whichever way halves are rounded.
    repeats = sampling.nearest.startswith("round") and whole and len(given) == len(changed)
    known = {
        ("nearest", "asymmetric"): sampling.nearest == "floor",
        ("nearest", "half_pixel"): repeats,
        ("nearest", "pytorch_half_pixel"): repeats,
        ("nearest", "half_pixel_symmetric"): repeats,
        ("linear", "half_pixel"): True,
        ("linear", "pytorch_half_pixel"): True,
        ("linear", "align_corners"): True,
        ("cubic", "half_pixel"): sampling.cubic == -0.75,
        ("cubic", "align_corners"): sampling.cubic == -0.75,
    }
    plain = not (sampling.antialias or sampling.exclude_outside)
    pictures = x.dim() == 4 and all(axis >= 2 for axis, *_ in changed)
    if not (known.get((sampling.mode, sampling.coordinates), False) and plain and pictures):
        raise NeedsSizes(
            f"mode {sampling.mode} with {sampling.coordinates} over dynamic sizes {tuple(x.shape)}"
        )
    if not (whole or corners):
        # PyTorch would take the ratio of the sizes, which are rounded.
        raise NeedsSizes(f"scales {given} of dynamic sizes {tuple(x.shape)}")
    mode = {"nearest": "nearest", "linear": "bilinear", "cubic": "bicubic"}[sampling.mode]
    sizes = list(x.shape[2:])
    for axis, size, *_ in changed:
        sizes[axis - 2] = size
    align = None if mode == "nearest" else corners
    return F.interpolate(x, size=sizes, mode=mode, align_corners=align)


def _scaled(size: Any, scale: float) -> Any:
    """A scale of small numbers, 3 / 2, keeps a dynamic size one that the back end can compute."""
    ratio = Fraction(scale)
    if ratio.denominator <= _LARGEST_DENOMINATOR:
        return size * ratio.numerator // ratio.denominator
    return math.floor(size * scale)
