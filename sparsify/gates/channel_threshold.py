"""A threshold for each feature.

Sources: He et al., "CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective
Sparsification", EMNLP 2024, where a feature counts what it is multiplied with on average; Chen et
al., "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference",
2025, where it counts the norm of its column of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.gates.base import Calibrated, Gate, quantile, register


@register
@dataclass(frozen=True)
class ChannelThreshold(Gate):
    """Keeps ``|x_i| > thresholds_i``.

    Calibrated, ``thresholds_i`` is ``t / importance_i``: one threshold ``t``, a quantile over all
    samples, for magnitudes times importance. A feature of no importance is never kept.
    """

    name = "channel_threshold"
    parameters = ("thresholds",)

    def keep(self, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return ~(x.abs() <= parameters[0])

    def shapes(self, features: int) -> tuple[tuple[int, ...], ...]:
        return ((features,),)

    @classmethod
    def calibrate(
        cls, samples: torch.Tensor, sparsity: float, importance: torch.Tensor
    ) -> Calibrated:
        common = quantile(samples.abs() * importance, sparsity)
        thresholds = torch.where(importance > 0, common / importance, torch.inf)
        return Calibrated(cls(), (thresholds,))
