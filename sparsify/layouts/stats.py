"""What can be measured about a weight before choosing how to store it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

BLOCKS: tuple[tuple[int, int], ...] = ((1, 4), (4, 1), (16, 1), (4, 4), (16, 16))
"""Block shapes (rows x columns) whose occupancy is reported."""

PATTERNS: tuple[tuple[int, int], ...] = ((1, 4), (2, 4), (4, 8))
"""N:M patterns along a row: at most N nonzeros among M neighbours."""


@dataclass(frozen=True)
class WeightStats:
    """Structure of one matrix ``W[rows, columns]``.

    Attributes:
        shape: (out_features, in_features).
        nnz: number of nonzero elements.
        dead_rows, dead_columns: rows and columns without a nonzero.
        occupancy: for each block shape of `BLOCKS`, the fraction of blocks holding a nonzero.
        conformity: for each N:M of `PATTERNS`, the fraction of M-groups with at most N nonzeros.
        bf16_exact: every element is fp32 and exactly a bfloat16.
    """

    shape: tuple[int, int]
    nnz: int
    dead_rows: int = 0
    dead_columns: int = 0
    occupancy: dict[tuple[int, int], float] = field(default_factory=dict)
    conformity: dict[tuple[int, int], float] = field(default_factory=dict)
    bf16_exact: bool = False

    @property
    def density(self) -> float:
        return self.nnz / max(1, self.shape[0] * self.shape[1])

    @classmethod
    def of(cls, weight: torch.Tensor) -> WeightStats:
        if weight.dim() != 2:
            raise ValueError(f"weight statistics need a matrix, got shape {tuple(weight.shape)}")
        nonzero = weight.detach() != 0
        return cls(
            shape=(weight.shape[0], weight.shape[1]),
            nnz=int(nonzero.sum()),
            dead_rows=int((~nonzero.any(1)).sum()),
            dead_columns=int((~nonzero.any(0)).sum()),
            occupancy={block: _occupancy(nonzero, block) for block in BLOCKS},
            conformity={pattern: _conformity(nonzero, pattern) for pattern in PATTERNS},
            bf16_exact=exact_in_bfloat16(weight),
        )


INEXACT_IN_BFLOAT16 = (
    "not all values are exact in bfloat16, and layouts lose nothing; store fp32 values "
    "(value_bits=32), or round the model first with RoundWeights('bfloat16')"
)


def exact_in_bfloat16(weight: torch.Tensor) -> bool:
    """Whether the lower half of every fp32 element is zero; false for other types."""
    if weight.dtype != torch.float32:
        return False
    return not bool((weight.detach().view(torch.int32) & 0xFFFF).any())


def _padded(nonzero: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    down, right = -nonzero.shape[0] % rows, -nonzero.shape[1] % columns
    return torch.nn.functional.pad(nonzero, (0, right, 0, down))


def _occupancy(nonzero: torch.Tensor, block: tuple[int, int]) -> float:
    rows, columns = block
    whole = _padded(nonzero, rows, columns)
    tiles = whole.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    return float(tiles.any(3).any(1).float().mean()) if tiles.numel() else 0.0


def _conformity(nonzero: torch.Tensor, pattern: tuple[int, int]) -> float:
    kept, group = pattern
    groups = _padded(nonzero, 1, group).unflatten(1, (-1, group))
    return float((groups.sum(2) <= kept).float().mean()) if groups.numel() else 0.0
