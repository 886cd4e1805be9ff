"""Convolutions and plain pooling, over one to three dims of places."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import Unsupported, operator

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_ADAPTIVE_MEANS: dict[int, Any] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


@operator("Conv")
def conv(
    node: Node, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Weight [out, in / groups, *kernel]."""
    rank = x.dim() - 2
    if rank not in _CONVOLUTIONS:
        raise Unsupported(f"{rank} dims of places")
    strides = node.get("strides", [1] * rank)
    dilations = node.get("dilations", [1] * rank)
    pads = padding(node, x.shape[2:], weight.shape[2:], strides, dilations)
    x, symmetric = pad_unevenly(x, pads)
    groups = node.get("group", 1)
    return _CONVOLUTIONS[rank](x, weight, bias, strides, symmetric, dilations, groups)


def padding(node: Node, size: Any, kernel: Any, strides: Any, dilations: Any) -> list[Any]:
    """Pads before and after each dim: given, or those that ``auto_pad`` asks for."""
    mode = node.get("auto_pad", "NOTSET")
    rank = len(kernel)
    if mode == "NOTSET":
        given = node.get("pads", [0] * 2 * rank)
        return [(given[d], given[d + rank]) for d in range(rank)]
    if mode == "VALID":
        return [(0, 0)] * rank
    pads = []
    for n, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
        steps = (n + stride - 1) // stride
        total = torch.sym_max((steps - 1) * stride + (k - 1) * dilation + 1 - n, 0)
        small = total // 2
        pads.append((small, total - small) if mode == "SAME_UPPER" else (total - small, small))
    return pads


def pad_unevenly(
    x: torch.Tensor, pads: list[Any], value: float = 0.0
) -> tuple[torch.Tensor, list[int]]:
    """Pads that differ before and after go to the tensor, others stay with the operator."""
    if all(isinstance(n, int) for pad in pads for n in pad) and all(a == b for a, b in pads):
        return x, [before for before, _ in pads]
    return F.pad(x, [n for pad in reversed(pads) for n in pad], value=value), [0] * len(pads)


@operator("GlobalAveragePool")
def global_average_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    rank = x.dim() - 2
    if rank in _ADAPTIVE_MEANS:
        return _ADAPTIVE_MEANS[rank](x, [1] * rank if rank > 1 else 1)
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)
