"""The mask that positions alone make: causality, a sliding window, and sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Band:
    """Which keys a query sees by their positions; called like any ``mask_mod``.

    Attributes:
        causal: key ``j`` is seen by query ``i`` only if ``j <= i``.
        window: only if it is less than so many positions away, ``|i - j| < window``; 0: however
            far away.
        sinks: the first keys, which no window hides.

    Source: Beltagy et al., "Longformer", 2020; Xiao et al., "Efficient Streaming Language Models
    with Attention Sinks", 2024.
    """

    causal: bool = False
    window: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.window < 0 or self.sinks < 0:
            raise ValueError(
                f"Band: window={self.window} and sinks={self.sinks} count keys; both must be at "
                "least 0"
            )

    @property
    def hides(self) -> bool:
        """Whether any key can be hidden."""
        return self.causal or self.window > 0

    def __call__(
        self, batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        distance = query - key
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.window:
            seen = (distance.abs() < self.window) | (key < self.sinks)
        return seen & (distance >= 0) if self.causal else seen

    def of_ranges(
        self,
        query: torch.Tensor,
        last_query: torch.Tensor,
        key: torch.Tensor,
        last_key: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether some, and whether every score is seen of queries and keys from first to last."""
        nearest, farthest = query - last_key, last_query - key
        low = torch.zeros_like(nearest) if self.causal else nearest
        some, every = farthest >= low, nearest >= low
        if not self.window:
            return some, every
        reach = self.window - 1
        # The lowest distance that the window sees is 0 if causal, else -reach.
        inside = (farthest >= (0 if self.causal else -reach)) & (nearest <= reach)
        some = inside | (some & (key < self.sinks))
        beyond = torch.maximum(key, torch.full_like(key, self.sinks))
        near = (last_query - beyond <= reach) & (nearest >= -reach)
        return some, every & (near | (last_key < self.sinks))
