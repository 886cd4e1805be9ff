"""R-Sparse: small inputs of every projection take a low-rank way past the weight.

Source: Zhang et al., "R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference", ICLR
2025, with the same sparsity and rank everywhere instead of a search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sparsify.gates import Gate, Threshold
from sparsify.passes.gating.observed import Observed
from sparsify.passes.gating.places import Plan
from sparsify.passes.gating.recipe import Gating


@dataclass(frozen=True)
class RSparse(Gating):
    """Large inputs meet the whole weight, small ones its largest singular values alone.

    ``U @ V`` being the best approximation of ``W`` of that rank::

        a = threshold(x);  y = a @ W.T + ((x - a) @ V.T) @ U.T

    Attributes:
        rank: of the approximation, as a share of the weight's smaller extent, above 0 and below 1.
            The other attributes are those of `Gating`.
    """

    rank: float = 0.1

    name = "r_sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rank < 1:
            raise ValueError(f"RSparse: rank={self.rank} must lie between 0 and 1")

    def rule(self) -> type[Gate]:
        return Threshold

    def plan(self, observed: Observed, sparsity: float) -> Plan:
        plan = super().plan(observed, sparsity)
        inner, outer = _low_rank(observed.weight, self.rank)
        assert plan.calibrated is not None
        keep = plan.calibrated.keep(observed.values)
        added = torch.where(keep, 0, observed.values) @ inner.T @ outer.T
        return replace(plan, low_rank=(inner, outer), error=observed.error(keep, added))

    def account(self, plan: Plan) -> str:
        assert plan.low_rank is not None
        return f"{super().account(plan)}; the rest by a weight of rank {len(plan.low_rank[0])}"


def _low_rank(weight: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``(V [rank, in_features], U [out_features, rank])``, the singular values in U."""
    rank = max(1, round(share * min(weight.shape)))
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return right[:rank].contiguous(), (left[:, :rank] * values[:rank]).contiguous()
