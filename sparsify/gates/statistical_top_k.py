"""About the ``k`` largest features, from mean and variance alone: linear time, no selection.

Source: You et al., "Spark Transformer: Reactivating Sparsity in FFN and Attention", 2025. There
the values also shrink by the threshold, which the model is trained with; here they stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch

from sparsify.gates.base import Calibrated, Gate, quantile, register


@register
@dataclass(frozen=True)
class StatisticalTopK(Gate):
    """Keeps ``x > mean + deviation * quantile(1 - k / features)``, of the normal distribution.

    Signs count: it is for values in front of an activation that suppresses negative ones. Where a
    token's features are normally distributed it keeps ``k`` of them; calibrated, ``k`` is what
    keeps the wanted number on average.
    """

    k: int

    name = "statistical_top_k"

    def keep(self, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        mean, deviation = _moments(x)
        return ~(x <= mean + deviation * self.quantile(x.shape[-1]))

    def quantile(self, features: int) -> float:
        """How many deviations above the mean the threshold lies."""
        self.shapes(features)
        return NormalDist().inv_cdf(1 - self.k / features)

    def shapes(self, features: int) -> tuple[tuple[int, ...], ...]:
        if not 0 < self.k < features:
            raise ValueError(
                f"gate {self.spec}: keeps more than 0 and fewer than all of {features} features"
            )
        return ()

    @classmethod
    def calibrate(
        cls, samples: torch.Tensor, sparsity: float, importance: torch.Tensor
    ) -> Calibrated:
        features = samples.shape[-1]
        mean, deviation = _moments(samples)
        tiny = torch.finfo(samples.dtype).tiny
        wanted = quantile((samples - mean) / deviation.clamp_min(tiny), sparsity)
        k = round(features * (1 - NormalDist().cdf(wanted)))
        return Calibrated(cls(min(max(1, k), features - 1)), ())


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each token, ``[..., 1]``."""
    mean = x.mean(-1, keepdim=True)
    square = (x - mean).square().sum(-1, keepdim=True)
    return mean, (square / max(1, x.shape[-1] - 1)).sqrt()
