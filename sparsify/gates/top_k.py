"""The largest features of each token, all of the same weight or each of its own.

Source of the weights: Chen et al., "WINA: Weight Informed Neuron Activation for Accelerating Large
Language Model Inference", 2025, whose gate keeps the largest ``|x_i| * norm(W[:, i])``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.gates.base import Calibrated, Gate, check_count, kept_count, register


@register
@dataclass(frozen=True)
class TopK(Gate):
    """Keeps the ``k`` features of largest magnitude, and those that equal the last of them."""

    k: int

    name = "top_k"

    def keep(self, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return _largest(x.abs(), self.k)

    def shapes(self, features: int) -> tuple[tuple[int, ...], ...]:
        check_count(self.spec, self.k, features)
        return ()

    @classmethod
    def calibrate(
        cls, samples: torch.Tensor, sparsity: float, importance: torch.Tensor
    ) -> Calibrated:
        return Calibrated(cls(kept_count(samples, sparsity)), ())


@register
@dataclass(frozen=True)
class WeightedTopK(Gate):
    """Keeps the ``k`` features of the largest ``|x_i| * importance_i``, and their equals."""

    k: int

    name = "weighted_top_k"
    parameters = ("importance",)

    def keep(self, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return _largest(x.abs() * parameters[0], self.k)

    def shapes(self, features: int) -> tuple[tuple[int, ...], ...]:
        check_count(self.spec, self.k, features)
        return ((features,),)

    @classmethod
    def calibrate(
        cls, samples: torch.Tensor, sparsity: float, importance: torch.Tensor
    ) -> Calibrated:
        return Calibrated(cls(kept_count(samples, sparsity)), (importance,))


def _largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    last = scores.topk(k, -1, sorted=False).values.amin(-1, keepdim=True)
    return ~(scores < last)
