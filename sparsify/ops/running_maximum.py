"""Blocks of keys whose scores lie so far below the maximum so far that they cannot matter.

Flash attention knows the scores of a block of keys before it reads the values. Where all of them,
for a tile of queries, are lower by more than ``skip`` than the largest that each query has seen in
the blocks before, the exponentials and the product with the values are left out. Each weight that
is left out is below ``exp(-skip)`` of the largest, so that ``n`` keys change an output by at most
``2 n exp(-skip)`` times the largest value.

Source: Zhang et al., "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any
Model Inference", 2025.
"""

from __future__ import annotations

import torch

TILE = 8
"""Queries of a tile of the narrowest kernels; wider ones leave out no more."""
KEYS_AT_ONCE = 64
"""Keys of a block that kernels compute together, at most."""


def below_maximum(scores: torch.Tensor, skip: float, block: int, tile: int = TILE) -> torch.Tensor:
    """Bool like ``scores``: pairs whose products with values are left out.

    Args:
        scores: ``[..., queries, keys]``, minus infinity where a key is not seen; NaN is never
            below.
        skip: above 0.
        block: keys of a block; it is computed in parts of `KEYS_AT_ONCE`.
        tile: queries that leave out a block together.
    """
    queries, keys = scores.shape[-2:]
    left_out = torch.zeros(scores.shape, dtype=torch.bool)
    lowest = torch.finfo(torch.float32).min
    for first in range(0, queries, tile):
        rows = slice(first, first + tile)
        before = scores.new_full(scores[..., rows, 0].shape, lowest)
        for start in range(0, keys, block):
            for at in range(start, min(start + block, keys), KEYS_AT_ONCE):
                part = slice(at, min(at + KEYS_AT_ONCE, start + block))
                highest = scores[..., rows, part].amax(-1).clamp(min=lowest)
                little = (highest - before < -skip).all(-1)
                left_out[..., rows, part] = little[..., None, None]
                # What is left out lies below the maximum, and does not move it.
                before = torch.maximum(before, highest)
    return left_out
