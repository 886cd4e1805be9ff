"""Every expert with a positive logit, its weight made of it by a normalisation.

Source: Song et al., "BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with
Chunk-Level Activation Sparsity", 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from sparsify.routers.base import Candidate, Router, Routes, Seen, largest, register, used


@register
@dataclass(frozen=True)
class ReluNorm(Router):
    """Weights are ``r / sqrt(mean(r^2) + epsilon) * weight`` of ``r = relu(logits)``.

    A token whose logits are all negative has no expert.
    """

    name = "relu_norm"
    parameters = ("weight", "epsilon")

    @classmethod
    def candidates(cls, seen: Seen) -> Iterator[Candidate]:
        yield from ((cls(), pair) for pair in product(seen.vectors(1.0), seen.scalars()))

    def shapes(self, experts: int) -> tuple[tuple[int, ...], ...]:
        return (experts,), (1,)

    def route(self, logits: torch.Tensor, *parameters: torch.Tensor) -> Routes:
        weight, epsilon = parameters
        kept = logits.relu()
        scaled = kept / (kept.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight
        values, experts = largest(kept, kept.shape[-1])
        return used(experts, scaled.gather(-1, experts), values > 0)
