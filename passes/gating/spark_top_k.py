"""Statistical top-k: gates below a threshold that follows from a token's mean and deviation are
zero.

Source: You et al., "Spark Transformer: Reactivating Sparsity in FFN and Attention", 2025, without
the training that goes with it there.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.gates import Gate, StatisticalTopK
from sparsify.passes.gating.recipe import At, Gating


@dataclass(frozen=True)
class SparkTopK(Gating):
    """Keeps about the same number of gates for each token, without selecting any.

    In front of the activation, where values are close to normally distributed::

        h = silu(statistical_top_k(x @ Wg.T));  y = (h * (x @ Wu.T)) @ Wd.T

    The attributes are those of `Gating`.
    """

    name = "spark_top_k"

    def rule(self) -> type[Gate]:
        return StatisticalTopK

    def gated(self) -> At:
        return "closed gates"
