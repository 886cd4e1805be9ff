"""Experts chosen by sigmoid and a bias that balances their load, in some groups of them only.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024. With zeros for the bias, no groups and
no normalisation it is the router of Llama 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.routers.base import Router, Routes, largest, register

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
