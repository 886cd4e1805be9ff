"""Rotary position embedding, written so that the passes recognise it."""

from __future__ import annotations

import torch

from sparsify.frontend.onnx.attend import merge_heads, split_heads
from sparsify.frontend.onnx.node import Node


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, size: int = 0, interleaved: bool = False
) -> torch.Tensor:
    """Rotates pairs of the first ``size`` features (0: all) by each token's angles.

    Args:
        x: ``[batch, heads, length, features]``.
        cos, sin: ``[batch, 1, length, size / 2]``, or broadcastable to it.
        interleaved: pairs are neighbours, else one is of the first half and one of the second.
    """
    size = size or x.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        pair = (first * cos - second * sin, first * sin + second * cos)
        turned = torch.stack(pair, -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        swapped = torch.cat([-second, first], -1)
        turned = turned * torch.cat([cos, cos], -1) + swapped * torch.cat([sin, sin], -1)
    return turned if size == x.shape[-1] else torch.cat([turned, rest], -1)


def rotate_heads(
    node: Node, x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """`rotate` of ``[batch, length, heads * features]`` by the attributes of RotaryEmbedding."""
    turned = rotate(
        split_heads(x, heads),
        cos.unsqueeze(1),
        sin.unsqueeze(1),
        node.get("rotary_embedding_dim", 0),
        bool(node.get("interleaved", 0)),
    )
    return merge_heads(turned)
