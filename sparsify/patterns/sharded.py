"""The context dealt out to the heads, and a window for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.patterns.base import Pattern, at_least


@dataclass(frozen=True)
class Sharded(Pattern):
    """Head ``h`` reads the blocks of keys ``h, h + shards, h + 2 shards ...``, and a window.

    All heads together read the whole context, each a shard of it.

    Source: Lin et al., "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads",
    2024.
    """

    shards: int = 4
    window: int = 2

    name = "sharded"
    per_head = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, shards=1)

    def keep(self, query: torch.Tensor, key: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        own = key % self.shards == head % self.shards
        return own | ((query - key).abs() <= self.window)
