"""Compressed sparse rows: the canonical form of a sparse weight, in memory and in files."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.layouts.base import Layout, register, require_matrix
from sparsify.layouts.stats import WeightStats

_SHORT = torch.iinfo(torch.int16).max


@register
@dataclass(frozen=True)
class Csr(Layout):
    """Row offsets int32 ``[rows + 1]``, columns ``[nnz]`` ascending in a row, values ``[nnz]``.

    Columns are int16 while the row is short enough, else int32: 6 bytes a nonzero against 8.
    Zeros of either sign are dropped.
    """

    name = "csr"
    tensors = ("values", "columns", "offsets")

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = require_matrix(weight)
        rows, columns = weight.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=weight.shape[0])
        offsets = torch.zeros(weight.shape[0] + 1, dtype=torch.int32)
        offsets[1:] = counts.cumsum(0)
        return {
            "values": weight[rows, columns].contiguous(),
            "columns": columns.to(_column_dtype(weight.shape[1])),
            "offsets": offsets,
        }

    def unpack(self, packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        counts = packed["offsets"].long().diff()
        rows = torch.repeat_interleave(torch.arange(shape[0]), counts)
        weight = torch.zeros(shape, dtype=packed["values"].dtype)
        weight[rows, packed["columns"].long()] = packed["values"]
        return weight

    def validate(self, packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> None:
        dtypes = {"columns": _column_dtype(shape[1]), "offsets": torch.int32}
        self.check_tensors(packed, values=torch.float32, **dtypes)
        values, columns, offsets = (packed[name] for name in self.tensors)
        if offsets.shape != (shape[0] + 1,):
            raise ValueError(f"csr: 'offsets' has {offsets.numel()} entries for {shape[0]} rows")
        if int(offsets[0]) != 0 or bool((offsets.long().diff() < 0).any()):
            raise ValueError("csr: 'offsets' must start at 0 and never decrease")
        if values.dim() != 1 or columns.dim() != 1:
            raise ValueError("csr: 'values' and 'columns' must have one dimension")
        if not values.numel() == columns.numel() == int(offsets[-1]):
            raise ValueError(
                f"csr: {values.numel()} values, {columns.numel()} columns, "
                f"but the offsets end at {int(offsets[-1])}"
            )
        if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < shape[1]:
            raise ValueError(f"csr: a column lies outside 0..{shape[1] - 1}")
        rises = columns.long().diff() > 0
        starts = offsets[1:-1].long()
        rises[starts[(starts > 0) & (starts < columns.numel())] - 1] = True
        if not bool(rises.all()):
            raise ValueError("csr: 'columns' must ascend within a row, without repetition")

    def estimate_nbytes(self, shape: tuple[int, int], nnz: int) -> int:
        return nnz * (4 + _column_dtype(shape[1]).itemsize) + 4 * (shape[0] + 1)

    def fits(self, stats: WeightStats) -> str | None:
        if stats.nnz > torch.iinfo(torch.int32).max:
            return f"{stats.nnz} nonzeros do not fit 32-bit row offsets"
        return None


def _column_dtype(columns: int) -> torch.dtype:
    return torch.int16 if columns <= _SHORT else torch.int32
