"""Soft decision trees, each of which leads a token to one expert.

Source: Ibrahim et al., "COMET: Learning Cardinality Constrained Mixture of Experts with Trees and
Local Search", 2023; the smooth step of decisions: Hazimeh et al., "The Tree Ensemble Layer", 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparsify.routers.base import Candidate, Router, Routes, Seen, largest, register, used

LEAST = 1e-6
"""A part so small is rounding: decisions near the ends of their step are zero or nearly so."""

_MOST_TREES = 16
"""That are looked for where code is to be recognised."""


@register
@dataclass(frozen=True)
class Tree(Router):
    """``trees`` perfect binary trees over the same experts, as many as a tree has leaves.

    Of each tree the logits hold first its decisions, level after level from the root, then a score
    of each leaf. A decision ``t`` goes left with the probability ``S(t)``: 0 below ``-gamma / 2``,
    1 above ``gamma / 2``, a cubic between. A leaf's probability ``v`` is the product on its way.
    Parts are ``sum_trees v exp(score)``; an expert whose part is at most `LEAST` of the largest is
    not chosen, and weights are parts over their sum. Trained trees decide, so that a token has
    about ``trees`` experts.
    """

    trees: int = 1

    name = "tree"
    parameters = ("gamma",)

    @classmethod
    def candidates(cls, seen: Seen) -> Iterator[Candidate]:
        for trees in dict.fromkeys((1, *seen.integers(_MOST_TREES))):
            yield from ((cls(trees), (g,)) for g in seen.scalars(1.0) if g > 0)

    def experts(self, width: int) -> int:
        experts = (width // self.trees + 1) // 2
        if width != self.trees * (2 * experts - 1) or experts & (experts - 1):
            raise ValueError(
                f"router {self.spec}: a token has {width} logits; a tree over 2^n experts takes "
                "2^n - 1 decisions and 2^n scores"
            )
        return experts

    def shapes(self, experts: int) -> tuple[tuple[int, ...], ...]:
        return ((1,),)

    def route(self, logits: torch.Tensor, *parameters: torch.Tensor) -> Routes:
        (gamma,) = parameters
        experts = self.experts(logits.shape[-1])
        parts = logits.unflatten(-1, (self.trees, -1))
        left = smooth_step(parts[..., : experts - 1], gamma)
        reached = torch.ones_like(parts[..., :experts])
        leaf = torch.arange(experts)
        for level in range(experts.bit_length() - 1):
            shift = experts.bit_length() - 1 - level
            node = (1 << level) - 1 + (leaf >> shift)
            right = (leaf >> (shift - 1)) % 2 == 1
            reached = reached * torch.where(right, 1 - left[..., node], left[..., node])
        scores = parts[..., experts - 1 :].masked_fill(reached == 0, float("-inf"))
        scores = scores - scores.amax((-2, -1), keepdim=True)
        gates = (reached * scores.exp()).sum(-2)
        gates = gates.masked_fill(gates <= LEAST * gates.amax(-1, keepdim=True), 0.0)
        weights, order = largest(gates / gates.sum(-1, keepdim=True), experts)
        return used(order, weights, weights > 0)


def smooth_step(t: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """0 below ``-gamma / 2``, 1 above ``gamma / 2``, ``-2 u^3 + 3/2 u + 1/2`` of ``u = t / gamma``
    between."""
    u = (t / gamma).clamp(-0.5, 0.5)
    return -2 * u**3 + 1.5 * u + 0.5
