"""Quantised numbers: scales and zero points, rounding and saturation, exact integer products."""

from __future__ import annotations

from collections.abc import Callable

import torch

_EXACT_IN_FLOAT32 = 2**24


def spread(scale: torch.Tensor, x: torch.Tensor, axis: int, block: int = 0) -> torch.Tensor:
    """A scale or a zero point in a shape that broadcasts over ``x``.

    Args:
        scale: one for all, one for each slice along ``axis``, or, with ``block``, one for so many
            neighbours along ``axis``.
    """
    if scale.dim() == 0 or (scale.dim() == 1 and scale.shape[0] == 1 and not block):
        return scale.reshape(())
    axis %= x.dim()
    if not block:
        return scale.reshape((-1,) + (1,) * (x.dim() - axis - 1))
    shape = list(scale.shape)
    shape.insert(axis + 1, block)
    repeated = scale.unsqueeze(axis + 1).expand(shape).flatten(axis, axis + 1)
    return repeated.narrow(axis, 0, x.shape[axis])


def quantise(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    dtype: torch.dtype,
    bounds: tuple[int, int] | None = None,
) -> torch.Tensor:
    """``saturate(round(x / scale) + zero)``, halves rounded to even; operands broadcast."""
    y = (x / scale).round()
    if zero is not None:
        y = y + zero.to(y.dtype)
    return saturate(y, dtype, bounds)


def saturate(
    x: torch.Tensor, dtype: torch.dtype, bounds: tuple[int, int] | None = None
) -> torch.Tensor:
    """Whole floating-point numbers as an integer type, bounded by its range or a smaller one."""
    info = torch.iinfo(dtype)
    low, high = bounds or (info.min, info.max)
    return x.clamp(low, high).to(dtype)


def to_float4(x: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, of either sign, as float32."""
    x = x.float().clamp(-6, 6)
    step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
    return (x / step).round() * step


def dequantise(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """``(x - zero) * scale`` in float32; operands broadcast."""
    y = x.float()
    if zero is not None:
        y = y - zero.float()
    return y * scale.float()


def without_zero(x: torch.Tensor, zero: torch.Tensor | None, axis: int = 0) -> torch.Tensor:
    """Integers less their zero point, as floating-point numbers that hold them exactly.

    Args:
        axis: along which zero points differ, if there is more than one.
    """
    y = x.float()
    if zero is None:
        return y
    if zero.dim() == 1:
        zero = spread(zero, x, axis)
    return y - zero.float()


def exactly(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    terms: int,
) -> torch.Tensor:
    """A product of 8-bit integers (given as float32), exact: in float64 where sums are long.

    Args:
        terms: how many products are summed up.

    Returns:
        Whole numbers as float32 or float64.
    """
    if isinstance(terms, int) and terms * 255 * 255 < _EXACT_IN_FLOAT32:
        return product(a, b)
    return product(a.double(), b.double())
