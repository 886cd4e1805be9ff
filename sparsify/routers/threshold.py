"""As many experts as a token needs: the most probable ones until they are probable enough.

Source: Yang et al., "XMoE: Sparse Models with Fine-grained and Adaptive Expert Selection", 2024.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparsify.routers.base import Candidate, Router, Routes, Seen, largest, register, used


@register
@dataclass(frozen=True)
class Threshold(Router):
    """Experts in the order of their probability, while those before have less than ``threshold``.

    Weights are the probabilities. The most probable expert is always chosen.

    Attributes:
        most: experts a token at most; 0: all of them.
    """

    most: int = 0

    name = "threshold"
    parameters = ("threshold",)

    @classmethod
    def candidates(cls, seen: Seen) -> Iterator[Candidate]:
        for most in (0, *seen.integers(seen.experts - 1)):
            yield from ((cls(most), (threshold,)) for threshold in seen.scalars())

    def slots(self, experts: int) -> int:
        return self.most or experts

    def shapes(self, experts: int) -> tuple[tuple[int, ...], ...]:
        return ((1,),)

    def route(self, logits: torch.Tensor, *parameters: torch.Tensor) -> Routes:
        (threshold,) = parameters
        slots = self.slots(logits.shape[-1])
        weights, experts = largest(logits.softmax(-1), slots)
        before = weights.cumsum(-1) - weights
        first = torch.arange(slots) == 0
        return used(experts, weights, (before < threshold) | first)
