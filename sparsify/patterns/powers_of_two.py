"""Distances that are powers of two, and a window."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.patterns.base import Pattern


@dataclass(frozen=True)
class PowersOfTwo(Pattern):
    """Blocks 1, 2, 4, 8 ... away, the first ones and a window: logarithmically many of all.

    Every block reaches every other one in logarithmically many layers.

    Source: Chen et al., "PowerAttention: Exponentially Scaling of Receptive Fields for Effective
    Sparse Attention", 2025.
    """

    window: int = 2
    sinks: int = 1

    name = "powers_of_two"

    def keep(self, query: torch.Tensor, key: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        distance = (query - key).abs()
        power = distance & (distance - 1) == 0
        return power | (distance <= self.window) | (key < self.sinks)
