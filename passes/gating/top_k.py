"""Top-k: each token keeps the features of largest magnitude."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify import gates
from sparsify.passes.gating.recipe import At, Gating


@dataclass(frozen=True)
class TopK(Gating):
    """Keeps the same number of features for each token, those of largest magnitude.

    Attributes:
        at: ``inputs`` of every linear, or ``gates`` of gated networks. The other attributes are
            those of `Gating`.
    """

    at: At = "inputs"

    name = "top_k"

    def rule(self) -> type[gates.Gate]:
        return gates.TopK

    def gated(self) -> At:
        return self.at
