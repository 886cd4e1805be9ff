"""A window, and every so many blocks behind and before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.patterns.base import Pattern, at_least


@dataclass(frozen=True)
class Strided(Pattern):
    """The last block of each run of ``stride`` blocks, as a summary of it, and a window.

    Source: Child et al., "Generating Long Sequences with Sparse Transformers", 2019, the pattern
    that it calls fixed.
    """

    window: int = 2
    stride: int = 8

    name = "strided"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, stride=1)

    def keep(self, query: torch.Tensor, key: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return ((query - key).abs() <= self.window) | (key % self.stride == self.stride - 1)
