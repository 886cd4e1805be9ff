"""Dense column by column, so that the columns of inputs that are zero need not be read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparsify.layouts.base import Layout, register, require_matrix
from sparsify.layouts.stats import INEXACT_IN_BFLOAT16, WeightStats, exact_in_bfloat16

_PAIRED = 32
"""Values of 16 bits that are stored in pairs."""

_LINE = 16
"""Values of 32 bits in a cache line."""


@register
@dataclass(frozen=True)
class DenseColumns(Layout):
    """Panels of ``rows`` output features, column after column: ``[ceil(out/rows), in, rows]``.

    A panel's part of a column is contiguous and some cache lines long: a kernel reads those of the
    inputs that are not zero. Whole columns (one panel) would be read at as many places of memory
    as there are inputs, and no cache of addresses holds those. The last panel is padded with
    zeros.

    With ``value_bits=16`` values are the upper halves of fp32 (bfloat16), which must be all there
    is of them. Of 32 neighbours, value ``i`` and value ``16 + i`` lie in one 32-bit word.
    """

    rows: int = 96
    value_bits: int = 32

    name = "dense_columns"
    tensors = ("panels",)
    is_dense = True

    def __post_init__(self) -> None:
        if self.value_bits not in (16, 32):
            raise ValueError(f"dense_columns: value_bits={self.value_bits} must be 16 or 32")
        unit = _PAIRED if self.value_bits == 16 else _LINE
        if self.rows <= 0 or self.rows % unit:
            raise ValueError(f"dense_columns: rows={self.rows} must be a multiple of {unit}")

    def panel_count(self, out_features: int) -> int:
        return -(-out_features // self.rows)

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = require_matrix(weight)
        if self.value_bits == 16 and not exact_in_bfloat16(weight):
            raise ValueError(f"{self.spec}: {INEXACT_IN_BFLOAT16}")
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -weight.shape[0] % self.rows))
        panels = padded.unflatten(0, (-1, self.rows)).transpose(1, 2).contiguous()
        if self.value_bits == 32:
            return {"panels": panels}
        halves = (panels.numpy().view(np.uint32) >> 16).astype(np.uint16)
        paired = halves.reshape(*halves.shape[:2], self.rows // _PAIRED, 2, 16).swapaxes(3, 4)
        bits = np.ascontiguousarray(paired).reshape(halves.shape).view(np.int16)
        return {"panels": torch.from_numpy(bits)}

    def unpack(self, packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        return self._matrix(packed["panels"])[: shape[0]].contiguous()

    def _matrix(self, panels: torch.Tensor) -> torch.Tensor:
        """All rows, those of the padding included."""
        if self.value_bits == 16:
            bits = panels.numpy().view(np.uint16).astype(np.uint32) << 16
            paired = bits.view(np.float32).reshape(*bits.shape[:2], self.rows // _PAIRED, 16, 2)
            ordered = np.ascontiguousarray(paired.swapaxes(3, 4)).reshape(bits.shape)
            panels = torch.from_numpy(ordered)
        return panels.transpose(1, 2).flatten(0, 1)

    def validate(self, packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> None:
        self.check_tensors(packed, panels=torch.float32 if self.value_bits == 32 else torch.int16)
        expected = (self.panel_count(shape[0]), shape[1], self.rows)
        found = tuple(packed["panels"].shape)
        if found != expected:
            raise ValueError(f"{self.spec}: tensor 'panels' has shape {found}, expected {expected}")
        if (used := shape[0] % self.rows) and self._matrix(packed["panels"][-1:])[used:].any():
            raise ValueError(f"{self.spec}: 'panels' is not zero behind the {shape[0]} outputs")

    def estimate_nbytes(self, shape: tuple[int, int], nnz: int) -> int:
        return self.value_bits // 8 * self.panel_count(shape[0]) * self.rows * shape[1]

    def fits(self, stats: WeightStats) -> str | None:
        if self.value_bits == 16 and not stats.bf16_exact:
            return INEXACT_IN_BFLOAT16
        return None
