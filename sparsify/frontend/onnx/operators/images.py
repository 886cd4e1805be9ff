"""Rearranging the places and channels of pictures."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.operators.transposed import transposed_convolution
from sparsify.frontend.onnx.registry import operator
from sparsify.frontend.onnx.tables import table


@operator("DepthToSpace")
def depth_to_space(node: Node, x: torch.Tensor) -> torch.Tensor:
    """``[n, c, h, w]`` to ``[n, c / size^2, h * size, w * size]``."""
    n, c, h, w = x.shape
    size = node.require("blocksize")
    depth = c // (size * size)
    if node.get("mode", "DCR") == "DCR":
        y = x.reshape(n, size, size, depth, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, depth, size, size, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, depth, h * size, w * size)


@operator("SpaceToDepth")
def space_to_depth(node: Node, x: torch.Tensor) -> torch.Tensor:
    """``[n, c, h, w]`` to ``[n, c * size^2, h / size, w / size]``."""
    n, c, h, w = x.shape
    size = node.require("blocksize")
    y = x.reshape(n, c, h // size, size, w // size, size)
    order = (0, 3, 5, 1, 2, 4) if node.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return y.permute(order).reshape(n, c * size * size, h // size, w // size)


@operator("CenterCropPad", since=18, host=("shape",))
def center_crop_pad(node: Node, x: torch.Tensor, shape: np.ndarray) -> torch.Tensor:
    """Cut or padded evenly, the odd element at the end."""
    axes = node.get("axes", range(x.dim()))
    pads = [0] * 2 * x.dim()
    for axis, size in zip(axes, shape.tolist(), strict=True):
        more = size - x.shape[axis]
        if more < 0:
            x = x.narrow(axis, -more // 2, size)
        else:
            from_end = x.dim() - 1 - axis % x.dim()
            pads[2 * from_end : 2 * from_end + 2] = [more // 2, more - more // 2]
    return F.pad(x, pads) if any(pads) else x


@operator("Col2Im", since=18, host=("image", "block"))
def col2im(node: Node, x: torch.Tensor, image: np.ndarray, block: np.ndarray) -> torch.Tensor:
    """Sums up overlapping blocks, ``[n, c * taps, blocks]`` to ``[n, c, *image]``.

    That is a transposed convolution whose kernel moves each tap to its place.
    """
    sizes, kernel = [int(n) for n in image], [int(n) for n in block]
    dims = len(sizes)
    strides = node.get("strides", [1] * dims)
    dilations = node.get("dilations", [1] * dims)
    pads = node.get("pads", [0] * 2 * dims)
    padded = [n + pads[i] + pads[i + dims] for i, n in enumerate(sizes)]
    counts = [
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(padded, dilations, kernel, strides, strict=True)
    ]
    taps = math.prod(kernel)
    blocks = x.reshape(-1, taps, *counts)
    weight = table(np.eye(taps).reshape(taps, 1, *kernel), x.dtype)
    y = transposed_convolution(dims)(blocks, weight, None, strides, 0, 0, 1, dilations)
    rest = []
    for i in reversed(range(dims)):
        rest += [-pads[i], sizes[i] + pads[i] - y.shape[2 + i]]
    return F.pad(y, rest).reshape(x.shape[0], x.shape[1] // taps, *sizes)
