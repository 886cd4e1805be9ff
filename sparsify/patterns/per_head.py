"""Another pattern for each head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.patterns.base import Pattern


@dataclass(frozen=True)
class PerHead(Pattern):
    """Head ``h`` reads what ``patterns[h]`` reads; None is all blocks.

    Source: Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model
    Compression", 2024.
    """

    patterns: tuple[Pattern | None, ...] = (None,)

    name = "per_head"
    per_head = True

    def __post_init__(self) -> None:
        if not self.patterns:
            raise ValueError("per_head: patterns are none; give one, or None, for each head")

    def keep(self, query: torch.Tensor, key: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        kept = (query < 0) & (head < 0)
        for pattern in dict.fromkeys(self.patterns):
            having = head < 0
            for number, own in enumerate(self.patterns):
                if own == pattern:
                    having = having | (head == number)
            read = having if pattern is None else having & pattern.keep(query, key, head)
            kept = kept | read
        return kept

    def __str__(self) -> str:
        counts = {p: self.patterns.count(p) for p in dict.fromkeys(self.patterns)}
        parts = [f"{n} of {'all' if p is None else p}" for p, n in counts.items()]
        return f"heads: {', '.join(parts)}"
