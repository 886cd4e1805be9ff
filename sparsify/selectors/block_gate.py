"""Blocks by a learned product of their mean key with the mean query.

Source: Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", 2024. There,
gates of queries and of keys are two matrices, and queries are pooled before positions are rotated
in; here a head has the product of the two, which costs one small product for each block of queries,
and pools what attention itself reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.selectors.base import BlockSelector, BlockView, register_block_selector
from sparsify.selectors.pooled import mean_keys


@register_block_selector
@dataclass(frozen=True)
class BlockGate(BlockSelector):
    """The softmax of scores as in `Pooled`, the mean query times the head's matrix."""

    name = "block_gate"
    scoring = "pooled"
    tensors = ("gates",)

    def weights(self, view: BlockView, **tensors: torch.Tensor) -> torch.Tensor:
        scores = mean_keys(view) @ (view.query.mean(0) @ tensors["gates"]) * view.scale
        return scores.softmax(0)
