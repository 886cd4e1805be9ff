"""A dense gate that training made sparse by cooling it, at its last temperature.

Source: Nie et al., "EvoMoE: An Evolutional Mixture-of-Experts Training Framework via
Dense-To-Sparse Gate", 2021; without the noise of training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from sparsify.routers.base import Candidate, Router, Routes, Seen, largest, register, used


@register
@dataclass(frozen=True)
class Temperature(Router):
    """Every expert whose ``softmax(logits / temperature)`` exceeds ``threshold``, weighted by it.

    The most probable expert is always chosen.
    """

    name = "temperature"
    parameters = ("temperature", "threshold")

    @classmethod
    def candidates(cls, seen: Seen) -> Iterator[Candidate]:
        positive = [t for t in seen.scalars(1.0) if t > 0]
        yield from ((cls(), pair) for pair in product(positive, seen.scalars()))

    def shapes(self, experts: int) -> tuple[tuple[int, ...], ...]:
        return (1,), (1,)

    def route(self, logits: torch.Tensor, *parameters: torch.Tensor) -> Routes:
        temperature, threshold = parameters
        weights, experts = largest((logits / temperature).softmax(-1), logits.shape[-1])
        first = torch.arange(logits.shape[-1]) == 0
        return used(experts, weights, (weights > threshold) | first)
