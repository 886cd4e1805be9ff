"""Experts chosen by sigmoid and a bias that balances their load, in some groups of them only.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024. With zeros for the bias, no groups and
no normalisation it is the router of Llama 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from sparsify.routers.base import Candidate, Router, Routes, Seen, largest, register

TINY = 1e-20
"""Added to the sum of a token's weights before they are divided by it."""


@register
@dataclass(frozen=True)
class SigmoidTopK(Router):
    """The best ``k`` by ``sigmoid(logits) + bias``, weighted by ``sigmoid(logits) * scale``.

    Attributes:
        k: experts a token.
        normalise: 1: weights are divided by their sum before they are scaled.
        groups: runs of neighbouring experts; a group counts as much as its best two together.
        kept: groups from which a token's experts may come.
    """

    k: int
    normalise: int = 1
    groups: int = 1
    kept: int = 1

    name = "sigmoid_top_k"
    parameters = ("bias", "scale")

    @classmethod
    def candidates(cls, seen: Seen) -> Iterator[Candidate]:
        for groups in dict.fromkeys((1, *seen.integers(seen.experts))):
            if seen.experts % groups:
                continue
            for kept in (1,) if groups == 1 else seen.integers(groups - 1):
                room = kept * (seen.experts // groups)
                counts = [k for k in seen.counts() if k <= room]
                for k, normalise in product(counts, (1, 0)):
                    router = cls(k, normalise, groups, kept)
                    yield from (
                        (router, pair) for pair in product(seen.vectors(0.0), seen.scalars(1.0))
                    )

    def decided(self, logits: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        keys = (logits.sigmoid() + parameters[0]).sort(dim=-1, descending=True).values
        higher = keys[:, :-1] > keys[:, 1:]
        return (higher if self.groups > 1 else higher[:, self.k - 1 : self.k]).all(dim=-1)

    def slots(self, experts: int) -> int:
        if experts % self.groups or not 0 < self.kept <= self.groups:
            raise ValueError(
                f"router {self.spec}: {experts} experts cannot be parted in {self.groups} equal "
                f"groups of which {self.kept} are kept"
            )
        if self.k > self.kept * (experts // self.groups):
            raise ValueError(
                f"router {self.spec}: the groups that are kept have "
                f"{self.kept * (experts // self.groups)} experts, {self.k} are chosen"
            )
        return self.k

    def shapes(self, experts: int) -> tuple[tuple[int, ...], ...]:
        return (experts,), (1,)

    def route(self, logits: torch.Tensor, *parameters: torch.Tensor) -> Routes:
        bias, scale = parameters
        scores = logits.sigmoid()
        keys = scores + bias
        if self.groups > 1:
            parts = keys.unflatten(-1, (self.groups, -1))
            best = largest(parts, 2)[0].sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool)
            kept.scatter_(-1, largest(best, self.kept)[1], True)
            keys = parts.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
        experts = largest(keys, self.k)[1]
        weights = scores.gather(-1, experts)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + TINY)
        return experts.to(torch.int32), weights * scale
