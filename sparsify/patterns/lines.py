"""Chosen columns of blocks, and chosen diagonals."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.patterns.base import Pattern


@dataclass(frozen=True)
class Lines(Pattern):
    """The blocks of keys in ``verticals``, and those at the distances in ``slashes``, for all.

    Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via
    Dynamic Sparse Attention", 2024, with indices that stay.
    """

    verticals: tuple[int, ...] = (0,)
    slashes: tuple[int, ...] = (0, 1)

    name = "lines"

    def keep(self, query: torch.Tensor, key: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        distance = (query - key).abs()
        kept = distance == 0
        for vertical in self.verticals:
            kept = kept | (key == vertical)
        for slash in self.slashes:
            kept = kept | (distance == slash)
        return kept
