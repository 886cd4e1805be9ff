"""Distances that are multiples of a step, as far as a reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.patterns.base import Pattern, at_least


@dataclass(frozen=True)
class Dilated(Pattern):
    """Every ``step``-th block on both sides, up to ``reach`` of them: a window with gaps.

    Source: Beltagy et al., "Longformer: The Long-Document Transformer", 2020; Ding et al.,
    "LongNet", 2023.
    """

    step: int = 4
    reach: int = 16

    name = "dilated"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, step=1)

    def keep(self, query: torch.Tensor, key: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        distance = (query - key).abs()
        return (distance % self.step == 0) & (distance <= self.step * self.reach)
