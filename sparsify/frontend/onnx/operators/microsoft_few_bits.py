"""Matrices of a few bits a weight, which ONNX Runtime's quantiser makes of language models.

They are unpacked to float32 when the file is read: the weights of the program are the numbers that
the file stands for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import MICROSOFT, Unsupported, operator
from sparsify.frontend.onnx.values import Constant


@operator("MatMulNBits", domain=MICROSOFT, constants=("weight", "scales", "zeros", "groups"))
def matmul_n_bits(
    node: Node,
    x: torch.Tensor,
    weight: torch.Tensor | Constant,
    scales: torch.Tensor | Constant,
    zeros: torch.Tensor | Constant | None = None,
    groups: torch.Tensor | Constant | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x W^T + bias``; W ``[N, K]`` in blocks along K, each of one scale and one zero point.

    ``weight`` is ``[N, blocks, bytes]``, the first number in the lowest bits; zero points are
    packed alike, ``[N, bytes]``, or of the type of the scales and not packed; without them the
    middle of the range is zero.
    """
    if not isinstance(weight, Constant) or not isinstance(scales, Constant):
        raise Unsupported("a weight or scales that are computed from the model's inputs")
    if isinstance(zeros, torch.Tensor):
        raise Unsupported("zero points that are computed from the model's inputs")
    if groups is not None:
        raise Unsupported("g_idx, an order of its own of the groups")
    outs, ins = node.require("N"), node.require("K")
    bits, block = node.get("bits", 4), node.require("block_size")
    if bits not in (2, 4, 8):
        raise Unsupported(f"{bits} bits a weight; 2, 4 and 8 are served")
    blocks = -(-ins // block)
    zero_points = None if zeros is None else zeros.tensor
    factors = scales.tensor

    def unpacked(stored: torch.Tensor) -> torch.Tensor:
        numbers = _unpack(stored.reshape(outs, -1), bits)[:, : blocks * block].float()
        numbers = numbers.reshape(outs, blocks, block)
        middle: torch.Tensor | float = float(1 << bits - 1)
        if zero_points is not None and zero_points.is_floating_point():
            middle = zero_points.reshape(outs, blocks, 1).float()
        elif zero_points is not None:
            middle = _unpack(zero_points.reshape(outs, -1), bits)[:, :blocks, None].float()
        wide = (numbers - middle) * factors.reshape(outs, blocks, 1).float()
        return wide.flatten(1)[:, :ins].contiguous()

    return F.linear(x, node.parameter(weight, f"unpacked{bits}x{block}", unpacked), bias)


def _unpack(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes ``[rows, bytes]`` as their numbers ``[rows, bytes * 8 / bits]``."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((stored.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)
