"""WINA: inputs that count little, for their magnitude and for their column of the weight, are zero.

Source: Chen et al., "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model
Inference", 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.gates import ChannelThreshold, Gate, WeightedTopK
from sparsify.passes.gating.observed import Observed
from sparsify.passes.gating.recipe import At, Gating


@dataclass(frozen=True)
class Wina(Gating):
    """Zeroes features whose magnitude times the norm of their column of the weight is small.

    As published it keeps the same number of the largest for each token; a threshold that does so
    on average costs less and lets tokens differ.

    Attributes:
        at: ``inputs`` of every linear; or ``gates`` of gated networks, whose features count the
            norm of their column of the down projection times the mean magnitude of what the up
            projection multiplies them with. The other attributes are those of `Gating`.
        per_token: keep the same number for each token.
    """

    at: At = "inputs"
    per_token: bool = False

    name = "wina"

    def rule(self) -> type[Gate]:
        return WeightedTopK if self.per_token else ChannelThreshold

    def gated(self) -> At:
        return self.at

    def importance(self, observed: Observed) -> torch.Tensor:
        return observed.column_norms() * observed.mean_factor()
