"""One threshold for all features of a tensor.

Sources: Lee et al., "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models",
COLM 2024, for activated gates; Liu et al., "Training-Free Activation Sparsity in Large Language
Models" (TEAL), ICLR 2025, for the input of every projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.gates.base import Calibrated, Gate, quantile, register


@register
@dataclass(frozen=True)
class Threshold(Gate):
    """Keeps ``|x| > threshold``; the threshold is a quantile of the magnitudes of all samples."""

    name = "threshold"
    parameters = ("threshold",)

    def keep(self, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return ~(x.abs() <= parameters[0])

    def shapes(self, features: int) -> tuple[tuple[int, ...], ...]:
        return ((1,),)

    @classmethod
    def calibrate(
        cls, samples: torch.Tensor, sparsity: float, importance: torch.Tensor
    ) -> Calibrated:
        return Calibrated(cls(), (torch.tensor([quantile(samples.abs(), sparsity)]),))
