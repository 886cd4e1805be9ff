"""Blocks where the latest queries look, and where they would look from an earlier place.

Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic
Sparse Attention", 2024. There, single columns and diagonals are kept; here blocks of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.selectors.base import BlockSelector, BlockView, register_block_selector


@register_block_selector
@dataclass(frozen=True)
class VerticalSlash(BlockSelector):
    """The latest queries' attention to the block, and to the block that lies as far before them.

    The first is high in blocks that all queries look at, the second at distances that they do.
    """

    name = "vertical_slash"
    scoring = "lines"

    def weights(self, view: BlockView, **tensors: torch.Tensor) -> torch.Tensor:
        found = latest_attention(view)
        return found[: view.blocks] + found[len(found) - view.blocks :]


def latest_attention(view: BlockView) -> torch.Tensor:
    """What the latest queries give to every block of the sequence, in all: ``[blocks]``."""
    scores = view.latest @ view.keys.mT * view.scale
    ahead = torch.ones_like(scores, dtype=torch.bool).triu(len(view.keys) - len(view.latest) + 1)
    attention = scores.masked_fill(ahead, float("-inf")).softmax(-1).sum(0)
    return torch.stack([part.sum() for part in attention.split(view.block)])
