"""Unstructured pruning by magnitude.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
NeurIPS 2015, without the retraining.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from sparsify.pruning.base import LayerSparsity, PruneReport, count_zeros
from sparsify.pruning.sites import prunable_weights


@dataclass(frozen=True)
class Unstructured:
    """Zeros the smallest weights.

    Exactly ``round(sparsity * elements)`` weights are zero afterwards, or as many as were zero
    before when those are more. Among equal magnitudes the earlier ones go first. Layers whose
    weight is tied are pruned once, embeddings never.

    Attributes:
        sparsity: the fraction of zeros wanted, 0 to 1.
        scope: ``layer`` reaches it in every weight; ``global`` over all of them together, so that
            layers of small weights lose more.
        skip: globs over qualified layer names that stay as they are; a name covers all inside it.
    """

    sparsity: float
    scope: Literal["layer", "global"] = "layer"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, int | float):
            raise TypeError(f"Unstructured: sparsity must be a number, not {self.sparsity!r}")
        if not 0 <= self.sparsity <= 1:
            hint = (
                f"; for {self.sparsity}% write {self.sparsity / 100}" if self.sparsity > 1 else ""
            )
            raise ValueError(f"Unstructured: sparsity={self.sparsity} must lie in 0..1{hint}")
        if self.scope not in ("layer", "global"):
            raise ValueError(f"Unstructured: scope={self.scope!r} must be 'layer' or 'global'")
        skip = (self.skip,) if isinstance(self.skip, str) else tuple(self.skip)
        object.__setattr__(self, "skip", skip)

    @torch.no_grad()
    def apply(self, model: nn.Module | ExportedProgram) -> PruneReport:
        """Prunes ``model`` in place.

        Raises:
            TypeError, ValueError: see `sparsify.pruning.prunable_weights`.
        """
        weights = prunable_weights(model, self.skip)
        tensors = [weight.tensor for weight in weights]
        before = count_zeros(tensors)
        groups = [tensors] if self.scope == "global" else [[tensor] for tensor in tensors]
        for group in groups:
            _zero_smallest(group, self.sparsity)
        layers = tuple(
            LayerSparsity(weight.names, tuple(weight.tensor.shape), was, now)
            for weight, was, now in zip(weights, before, count_zeros(tensors), strict=True)
        )
        return PruneReport(str(self), layers)


def _zero_smallest(tensors: list[torch.Tensor], sparsity: float) -> None:
    magnitude = torch.cat([_magnitude(tensor) for tensor in tensors])
    count = round(sparsity * magnitude.numel())
    if count == 0:
        return
    threshold = magnitude.kthvalue(count).values
    zero = magnitude < threshold
    ties = (magnitude == threshold).nonzero().squeeze(1)
    zero[ties[: count - int(zero.sum())]] = True
    for tensor, mask in zip(tensors, zero.split([t.numel() for t in tensors]), strict=True):
        tensor.masked_fill_(mask.reshape(tensor.shape), 0)


def _magnitude(tensor: torch.Tensor) -> torch.Tensor:
    """Half types widened, which is exact and gives all layers one type to compare in."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().abs().to(wide).flatten()
