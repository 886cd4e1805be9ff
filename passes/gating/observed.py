"""What calibration shows at one place where features may be gated."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Observed:
    """Values that a gate would see, and what the linear behind it makes of them.

    Attributes:
        values: ``[tokens, features]``, what the gate is applied to.
        contribution: ``[tokens, features]``, what the linear reads while all are kept.
        weight: of the linear, ``[out_features, features]``.
    """

    values: torch.Tensor
    contribution: torch.Tensor
    weight: torch.Tensor

    def column_norms(self) -> torch.Tensor:
        """The Euclidean norm of each feature's column of the weight."""
        return self.weight.norm(dim=0)

    def mean_factor(self) -> torch.Tensor:
        """The mean magnitude of what each value is multiplied with: 1 where nothing does it.

        Where a value is zero the factor cannot be seen; such tokens are left out.
        """
        seen = self.values != 0
        factor = torch.where(seen, self.contribution / self.values, 0).abs()
        return factor.sum(0) / seen.sum(0).clamp_min(1)

    def error(self, keep: torch.Tensor, added: torch.Tensor | None = None) -> float:
        """The norm of what the linear's result changes by, over the norm of the result.

        Args:
            keep: which features are kept.
            added: ``[tokens, out_features]`` that stands in for those that are not.
        """
        lost = torch.where(keep, 0, self.contribution) @ self.weight.T
        if added is not None:
            lost = lost - added
        whole = (self.contribution @ self.weight.T).norm()
        return float(lost.norm() / whole) if whole else 0.0
