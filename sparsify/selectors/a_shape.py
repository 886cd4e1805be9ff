"""The nearest blocks, whatever they hold.

Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic
Sparse Attention", 2024, whose A-shape this is together with the first blocks, which are read
anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.selectors.base import BlockSelector, BlockView, register_block_selector


@register_block_selector
@dataclass(frozen=True)
class AShape(BlockSelector):
    """One over the distance in blocks, from 1 for the block of the last query."""

    name = "a_shape"
    scoring = "nearness"

    def weights(self, view: BlockView, **tensors: torch.Tensor) -> torch.Tensor:
        return 1 / torch.arange(view.blocks, 0, -1, dtype=view.query.dtype)
