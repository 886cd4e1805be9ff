"""How well a mixture of experts uses memory and arithmetic, counting what is activated alone.

Source: Jiang et al., "MoE-CAP: Benchmarking Cost, Accuracy and Performance of Sparse
Mixture-of-Experts Systems", 2024: sparse model bandwidth utilisation (S-MBU) and sparse model FLOPS
utilisation (S-MFU).
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.ops import ExpertsShape


@dataclass(frozen=True)
class Utilisation:
    """One call of a layer's experts.

    Attributes:
        slots: experts of a token.
        tokens: of the call.
        active: experts that have a token.
        seconds: of the call.
        bytes_per_second, flops_per_second: what the machine can do at most.
        nbytes: of one expert as it is stored; by default dense, in float32.
        density: share of the weights that are not zero.
    """

    shape: ExpertsShape
    slots: int
    tokens: int
    active: float
    seconds: float
    bytes_per_second: float
    flops_per_second: float
    nbytes: float | None = None
    density: float = 1.0

    @property
    def weights(self) -> int:
        """Weights of one expert."""
        shape = self.shape
        return shape.hidden * (shape.parts * shape.in_features + shape.out_features)

    @property
    def bandwidth(self) -> float:
        """S-MBU: bytes of the active experts' weights, over what memory could bring meanwhile."""
        nbytes = 4 * self.weights if self.nbytes is None else self.nbytes
        return nbytes * self.active / self.seconds / self.bytes_per_second

    @property
    def arithmetic(self) -> float:
        """S-MFU: operations of the chosen experts on nonzeros, over those possible meanwhile."""
        products = self.density * self.weights * self.tokens * self.slots
        return 2 * products / self.seconds / self.flops_per_second

    @property
    def text(self) -> str:
        return (
            f"{self.slots} of {self.shape.count} experts a token, {self.active:.1f} active at "
            f"{self.tokens} tokens: S-MBU {self.bandwidth:.2f}, S-MFU {self.arithmetic:.2f}"
        )
