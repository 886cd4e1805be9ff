"""A window around the query, and the first keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.patterns.base import Pattern


@dataclass(frozen=True)
class WindowSinks(Pattern):
    """The shape of an A: the nearest blocks, ``window`` on a side and the own, and the first ones.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2024; Han et
    al., "LM-Infinite", 2024.
    """

    window: int = 8
    sinks: int = 1

    name = "window_sinks"

    def keep(self, query: torch.Tensor, key: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return ((query - key).abs() <= self.window) | (key < self.sinks)
