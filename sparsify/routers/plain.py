"""The experts with the largest logits, all with the weight one: a dense network split in parts.

Source: Zhang et al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", 2022.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparsify.routers.base import Candidate, Router, Routes, Seen, largest, register


@register
@dataclass(frozen=True)
class TopK(Router):
    """Attributes: ``k`` experts a token."""

    k: int

    name = "top_k"

    @classmethod
    def candidates(cls, seen: Seen) -> Iterator[Candidate]:
        yield from ((cls(k), ()) for k in seen.counts())

    def slots(self, experts: int) -> int:
        return self.k

    def route(self, logits: torch.Tensor, *parameters: torch.Tensor) -> Routes:
        values, experts = largest(logits, self.k)
        return experts.to(torch.int32), torch.ones_like(values)
