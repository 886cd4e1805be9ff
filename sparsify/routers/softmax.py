"""The most probable experts, weighted by their probability.

Sources: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
Layer", 2017 (softmax over the chosen ones: ``normalise=1``); Fedus et al., "Switch Transformers",
2022 (softmax over all: ``normalise=0``). Mixtral, Granite and Qwen 3 are of the first kind, OLMoE
and Qwen 2 of the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparsify.routers.base import Candidate, Router, Routes, Seen, largest, register


@register
@dataclass(frozen=True)
class SoftmaxTopK(Router):
    """Softmax over all experts, then the best ``k``.

    Attributes:
        k: experts a token.
        normalise: 1: the weights of a token are made to add up to one, which is softmax over the
            chosen experts alone.
    """

    k: int
    normalise: int = 1

    name = "softmax_top_k"

    @classmethod
    def candidates(cls, seen: Seen) -> Iterator[Candidate]:
        for k in seen.counts():
            yield from ((cls(k, normalise), ()) for normalise in (1, 0))

    def slots(self, experts: int) -> int:
        return self.k

    def route(self, logits: torch.Tensor, *parameters: torch.Tensor) -> Routes:
        weights, experts = largest(logits.softmax(-1), self.k)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts.to(torch.int32), weights
