"""CATS: small activated gates of gated networks are zero.

Source: Lee et al., "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models",
COLM 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.gates import Gate, Threshold
from sparsify.passes.gating.recipe import At, Gating


@dataclass(frozen=True)
class Cats(Gating):
    """Zeroes activated gates whose magnitude is at most a quantile of the layer's.

    Rows of the up projection and columns of the down projection that belong to them are not
    computed::

        h = threshold(silu(x @ Wg.T));  y = (h * (x @ Wu.T)) @ Wd.T

    The attributes are those of `Gating`.
    """

    name = "cats"

    def rule(self) -> type[Gate]:
        return Threshold

    def gated(self) -> At:
        return "gates"
