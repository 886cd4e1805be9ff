"""ConvTranspose, over one to three dims of places."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import Unsupported, operator

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def transposed_convolution(dims: int) -> Callable[..., torch.Tensor]:
    """PyTorch's function over so many dims of places."""
    if dims not in _TRANSPOSED:
        raise Unsupported(f"{dims} dims of places")
    return _TRANSPOSED[dims]


@operator("ConvTranspose")
def conv_transpose(
    node: Node, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    dims = weight.dim() - 2
    stride = tuple(node.get("strides", (1,) * dims))
    dilation = tuple(node.get("dilations", (1,) * dims))
    extra = tuple(node.get("output_padding", (0,) * dims))
    full = [
        (size - 1) * s + d * (k - 1) + 1 + e
        for size, s, d, k, e in zip(
            x.shape[2:], stride, dilation, weight.shape[2:], extra, strict=True
        )
    ]
    begin, end = _transposed_pads(node, x, full, stride)
    compute = transposed_convolution(dims)
    # PyTorch takes away the same on both sides, so what is more on one side is cut off after.
    both = tuple(max(min(b, e), 0) for b, e in zip(begin, end, strict=True))
    fits = all(e < s or e < d for e, s, d in zip(extra, stride, dilation, strict=True))
    given = extra if fits else (0,) * dims
    group = node.get("group", 1)
    y = compute(x, weight, bias, stride, both, given, group, dilation)
    rest = [
        amount
        for b, e, p, g, more in reversed(list(zip(begin, end, both, given, extra, strict=True)))
        for amount in (p - b, p - e + more - g)
    ]
    if not any(rest):
        return y
    if bias is not None and any(amount > 0 for amount in rest):
        # Where no input reaches, the bias alone is the result.
        y = y - bias.reshape((-1,) + (1,) * dims)
        return F.pad(y, rest) + bias.reshape((-1,) + (1,) * dims)
    return F.pad(y, rest)


def _transposed_pads(
    node: Node, x: torch.Tensor, full: list[int], stride: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is taken away at the beginning and the end of each dim of the full result."""
    dims = len(full)
    auto_pad, shape = node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if shape is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        shape = [size * s for size, s in zip(x.shape[2:], stride, strict=True)]
    if shape is None:
        pads = node.get("pads", (0,) * (2 * dims)) if auto_pad == "NOTSET" else (0,) * (2 * dims)
        return tuple(pads[:dims]), tuple(pads[dims:])
    total = [have - want for have, want in zip(full, shape[-dims:], strict=True)]
    # What a shape wants beyond the full result is added at its end.
    small = tuple(max(t, 0) // 2 for t in total)
    large = tuple(t - s for t, s in zip(total, small, strict=True))
    if auto_pad == "SAME_UPPER" or min(total) < 0:
        return small, large
    return large, small
