"""TEAL: small inputs of every projection are zero.

Source: Liu et al., "Training-Free Activation Sparsity in Large Language Models" (TEAL), ICLR 2025,
with the same sparsity everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.gates import Gate, Threshold
from sparsify.passes.gating.recipe import Gating


@dataclass(frozen=True)
class Teal(Gating):
    """Zeroes inputs of linears whose magnitude is at most a quantile of the tensor's.

    Columns of the weight that belong to them are not read::

        y = threshold(x) @ W.T

    The attributes are those of `Gating`.
    """

    name = "teal"

    def rule(self) -> type[Gate]:
        return Threshold
