"""Blocks by the product of their mean key with the mean query.

Source: Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient
Long-Sequence Inference", 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.selectors.base import BlockSelector, BlockView, register_block_selector


@register_block_selector
@dataclass(frozen=True)
class Pooled(BlockSelector):
    """The softmax of the mean query's scores over mean keys.

    What a single key has for a single query is lost in both means: see `QueryAware`.
    """

    name = "pooled"
    scoring = "pooled"

    def weights(self, view: BlockView, **tensors: torch.Tensor) -> torch.Tensor:
        scores = mean_keys(view) @ view.query.mean(0) * view.scale
        return scores.softmax(0)


def mean_keys(view: BlockView) -> torch.Tensor:
    """``[view.blocks, head_dim]``."""
    blocks = view.keys.split(view.block)[: view.blocks]
    return torch.stack([block.mean(0) for block in blocks])
