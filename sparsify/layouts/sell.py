"""SELL-C-sigma with blocks along in_features: the layout of unstructured sparse weights.

Source: Kreutzer et al., "A unified sparse matrix data format for efficient general sparse
matrix-vector multiplication on modern processors with wide SIMD units", SIAM J. Sci. Comput. 36(5),
2014. The K blocks and the pre-scaled 16-bit columns are ours: a block of activations stays in the
first-level cache, and one 64-bit load brings four column offsets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from sparsify.layouts.base import LANES, Layout, register, require_matrix
from sparsify.layouts.stats import WeightStats

_TAIL = 16
"""Zero values past the end, so that a vector load of the last step stays inside the tensor."""


@register
@dataclass(frozen=True)
class Sell(Layout):
    """Groups of ``rows`` rows advance together, one nonzero of each row a step.

    Rows are sorted by nonzero count inside each window of ``window`` rows and each block of
    ``k_block`` columns, so that the rows of a group are about equally long; the shorter ones are
    padded with zeros. Groups are stored K block after K block. Packed tensors::

        starts   int32 [k_blocks * groups + 1]         first step of each group
        outputs  int32 [k_blocks * groups * rows]      output row of each slot, -1 past the last
        columns  int64 [steps * rows / 4]              four uint16: column within the block * LANES
        values   fp32  [steps * rows + 16]             value of each slot, step after step
    """

    rows: int = 8
    k_block: int = 384
    window: int = 128

    name = "sell"
    tensors = ("starts", "outputs", "columns", "values")

    def __post_init__(self) -> None:
        if self.rows <= 0 or self.rows % 4:
            raise ValueError(f"sell: rows={self.rows} must be a positive multiple of 4")
        if not 0 < self.k_block * LANES <= 1 << 16:
            raise ValueError(f"sell: k_block={self.k_block} must be 1..{(1 << 16) // LANES}")
        if self.window <= 0 or self.window % self.rows:
            raise ValueError(f"sell: window={self.window} must be a multiple of rows={self.rows}")

    @property
    def unit(self) -> int:
        return self.window

    def blocks(self, in_features: int) -> int:
        return -(-in_features // self.k_block)

    def groups(self, out_features: int) -> int:
        return -(-out_features // self.rows)

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        dense = require_matrix(weight).numpy()
        out_features, in_features = dense.shape
        groups = self.groups(out_features)
        slots = groups * self.rows
        starts, outputs, columns, values = [np.zeros(1, np.int64)], [], [], []
        step = 0
        for begin in range(0, in_features, self.k_block):
            block = dense[:, begin : begin + self.k_block]
            row, column = np.nonzero(block)
            count = np.bincount(row, minlength=slots)
            order = _window_order(count, self.window, out_features)
            lengths = count[order].reshape(groups, self.rows).max(axis=1)
            first = step + np.concatenate([[0], np.cumsum(lengths)])
            slot_of_row = np.empty(slots, np.int64)
            slot_of_row[order] = np.arange(slots)
            nth = np.arange(row.size) - (np.cumsum(count) - count)[row]
            slot = slot_of_row[row]
            at = (first[slot // self.rows] - step + nth) * self.rows + slot % self.rows
            block_columns = np.zeros(int(lengths.sum()) * self.rows, np.uint16)
            block_values = np.zeros(block_columns.size, np.float32)
            block_columns[at] = column * LANES
            block_values[at] = block[row, column]
            starts.append(first[1:])
            outputs.append(np.where(order < out_features, order, -1))
            columns.append(block_columns)
            values.append(block_values)
            step = int(first[-1])
        return {
            "starts": _tensor(starts, np.int32),
            "outputs": _tensor(outputs, np.int32),
            "columns": torch.from_numpy(
                np.concatenate(columns or [np.zeros(0, np.uint16)]).view(np.int64)
            ),
            "values": _tensor([*values, np.zeros(_TAIL)], np.float32),
        }

    def unpack(self, packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        starts, outputs = packed["starts"].numpy(), packed["outputs"].numpy()
        columns = packed["columns"].numpy().view(np.uint16) // LANES
        values = packed["values"].numpy()[: columns.size]
        steps = np.diff(starts)
        group = np.repeat(np.arange(steps.size), steps)
        slot = group[:, None] * self.rows + np.arange(self.rows)
        block = group[:, None] // max(1, self.groups(shape[0]))
        filled = values.reshape(-1, self.rows) != 0
        weight = np.zeros(shape, np.float32)
        row = outputs[slot][filled]
        column = (columns.reshape(-1, self.rows) + block * self.k_block)[filled]
        weight[row, column] = values.reshape(-1, self.rows)[filled]
        return torch.from_numpy(weight)

    def validate(self, packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> None:
        dtypes = {"starts": torch.int32, "outputs": torch.int32, "columns": torch.int64}
        self.check_tensors(packed, values=torch.float32, **dtypes)
        starts, outputs, columns, values = (packed[name] for name in self.tensors)
        if columns.dim() != 1 or values.dim() != 1:
            raise ValueError(f"{self.spec}: 'columns' and 'values' must have one dimension")
        count = self.blocks(shape[1]) * self.groups(shape[0])
        if starts.shape != (count + 1,) or int(starts[0]) != 0 or bool((starts.diff() < 0).any()):
            raise ValueError(f"{self.spec}: 'starts' must rise from 0 over {count + 1} entries")
        slots = int(starts[-1]) * self.rows
        if columns.numel() * 4 != slots or values.numel() != slots + _TAIL:
            raise ValueError(
                f"{self.spec}: {slots} slots, but {columns.numel() * 4} columns "
                f"and {values.numel() - _TAIL} values"
            )
        if outputs.shape != (count * self.rows,):
            raise ValueError(f"{self.spec}: 'outputs' has {outputs.numel()} entries")
        expected = torch.arange(self.groups(shape[0]) * self.rows)
        expected[shape[0] :] = -1
        for block in outputs.reshape(self.blocks(shape[1]), expected.numel()):
            if not torch.equal(block.long().sort().values, expected.sort().values):
                raise ValueError(f"{self.spec}: 'outputs' is not a permutation of the rows")
        offsets = columns.numpy().view(np.uint16)
        if offsets.size and (offsets % LANES).any():
            raise ValueError(f"{self.spec}: a column offset is no multiple of {LANES}")
        group_of_step = np.repeat(np.arange(count), starts.diff().numpy())
        block_of_step = group_of_step // max(1, self.groups(shape[0]))
        limit = np.minimum(self.k_block, shape[1] - block_of_step * self.k_block) * LANES
        if offsets.size and (offsets.reshape(-1, self.rows) >= limit[:, None]).any():
            raise ValueError(f"{self.spec}: a column lies outside its block")

    def estimate_nbytes(self, shape: tuple[int, int], nnz: int) -> int:
        slots = self.groups(shape[0]) * self.rows
        entries = self.blocks(shape[1]) * slots
        padded = round(entries * self._padded_length(shape, nnz))
        return 6 * padded + 4 * entries + 4 * entries // self.rows + 4 + 4 * _TAIL

    def _padded_length(self, shape: tuple[int, int], nnz: int) -> float:
        """Expected steps of a slot when the nonzeros lie at random.

        Of ``w`` rows sorted by count the extremes lie about ``2 sigma sqrt(2 ln w)`` apart, which
        the window's groups share; a group is padded to its longest row.
        """
        if nnz == 0:
            return 0.0
        density = nnz / (shape[0] * shape[1])
        mean = density * shape[1] / self.blocks(shape[1])
        window = min(self.window, self.groups(shape[0]) * self.rows)
        spread = math.sqrt(mean * (1 - density) * 2 * math.log(window))
        return mean + spread * self.rows / window

    def fits(self, stats: WeightStats) -> str | None:
        if stats.nnz > torch.iinfo(torch.int32).max:
            return f"{stats.nnz} nonzeros do not fit 32-bit step numbers"
        return None


def _window_order(count: np.ndarray, window: int, rows: int) -> np.ndarray:
    """Rows sorted by count inside each window; slots past the last row stay at the end."""
    key = np.where(np.arange(count.size) < rows, count, np.iinfo(np.int64).max)
    window_of = np.arange(count.size) // window
    return np.lexsort((key, window_of))


def _tensor(parts: list[np.ndarray], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype))
