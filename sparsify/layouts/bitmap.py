"""One bit a weight, and the nonzeros packed: the layout that few tokens read fastest.

With a token or two, a linear takes as long as its weight takes to come from memory. From half to
nine tenths of zeros nothing is smaller than a bit for each weight: an index costs 16 of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparsify.layouts.base import Layout, register, require_matrix
from sparsify.layouts.stats import INEXACT_IN_BFLOAT16, WeightStats, exact_in_bfloat16

_TAIL = 32
"""Zero values past the end, so that a vector load of the last word stays inside the tensor."""

_ROWS = (1, 2, 4, 8, 16)


@register
@dataclass(frozen=True)
class Bitmap(Layout):
    """Groups of ``rows`` rows advance together along in_features, a word of bits of each at a time.

    A word has 16 bits when values are fp32, bit ``i`` for column ``i``. With ``value_bits=16``
    values are the upper halves of fp32 (bfloat16), which must be all there is of them, and a word
    has 32 bits: bit ``2i`` for column ``i``, bit ``2i + 1`` for column ``16 + i``, so that a 32-bit
    lane holds two values whose neighbours are those of the columns. Packed tensors::

        starts  int32              [groups + 1]           first value of each group
        masks   int16, int32       [groups, words, rows]  a bit is set where the weight is nonzero
        values  fp32, int16 (bf16) [nnz + 32]             word after word, in the order of the bits

    Rows past the last are empty. Zeros of either sign are dropped.
    """

    rows: int = 4
    value_bits: int = 32

    name = "bitmap"
    tensors = ("starts", "masks", "values")

    def __post_init__(self) -> None:
        if self.rows not in _ROWS:
            raise ValueError(f"bitmap: rows={self.rows} must be one of {_ROWS}")
        if self.value_bits not in (16, 32):
            raise ValueError(f"bitmap: value_bits={self.value_bits} must be 16 or 32")

    @property
    def word(self) -> int:
        """Columns of one word."""
        return 16 if self.value_bits == 32 else 32

    def words(self, in_features: int) -> int:
        return -(-in_features // self.word)

    def groups(self, out_features: int) -> int:
        return -(-out_features // self.rows)

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = require_matrix(weight)
        if self.value_bits == 16 and not exact_in_bfloat16(weight):
            raise ValueError(f"{self.spec}: {INEXACT_IN_BFLOAT16}")
        out_features, in_features = weight.shape
        groups, words = self.groups(out_features), self.words(in_features)
        right, down = words * self.word - in_features, groups * self.rows - out_features
        padded = torch.nn.functional.pad(weight, (0, right, 0, down)).numpy()
        ordered = self._in_order(padded.reshape(groups, self.rows, words, self.word))
        bits = ordered != 0
        values = ordered[bits]
        starts = np.zeros(groups + 1, np.int32)
        starts[1:] = np.cumsum(np.count_nonzero(bits, axis=(1, 2, 3)))
        masks: np.ndarray = np.packbits(bits, axis=-1, bitorder="little").view(self._mask_dtype)[
            ..., 0
        ]
        if self.value_bits == 16:
            values = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
        return {
            "starts": torch.from_numpy(starts),
            "masks": torch.from_numpy(masks),
            "values": torch.from_numpy(np.concatenate([values, np.zeros(_TAIL, values.dtype)])),
        }

    def unpack(self, packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        bits = self._bits(packed)
        values = packed["values"].numpy()[: np.count_nonzero(bits)]
        if self.value_bits == 16:
            values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        ordered = np.zeros(bits.shape, np.float32)
        ordered[bits] = values
        padded = self._in_place(ordered)
        return torch.from_numpy(padded[: shape[0], : shape[1]].copy())

    def validate(self, packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> None:
        values_dtype = torch.float32 if self.value_bits == 32 else torch.int16
        masks_dtype = torch.int16 if self.value_bits == 32 else torch.int32
        self.check_tensors(packed, starts=torch.int32, masks=masks_dtype, values=values_dtype)
        starts, masks, values = (packed[name] for name in self.tensors)
        groups, words = self.groups(shape[0]), self.words(shape[1])
        if masks.shape != (groups, words, self.rows):
            expected = (groups, words, self.rows)
            found = tuple(masks.shape)
            raise ValueError(f"{self.spec}: tensor 'masks' has shape {found}, expected {expected}")
        bits = self._bits(packed)
        counts = np.count_nonzero(bits, axis=(1, 2, 3))
        if starts.shape != (groups + 1,) or int(starts[0]) != 0:
            raise ValueError(f"{self.spec}: 'starts' must rise from 0 over {groups + 1} entries")
        if not np.array_equal(np.diff(starts.numpy().astype(np.int64)), counts):
            raise ValueError(f"{self.spec}: 'starts' does not follow from the bits of 'masks'")
        if values.shape != (int(counts.sum()) + _TAIL,):
            raise ValueError(
                f"{self.spec}: {int(counts.sum())} bits are set, but 'values' has shape "
                f"{tuple(values.shape)}, {_TAIL} zeros at its end included"
            )
        padded = self._in_place(bits)
        if padded[shape[0] :].any() or padded[:, shape[1] :].any():
            raise ValueError(f"{self.spec}: a bit of 'masks' lies outside the weight {shape}")

    def estimate_nbytes(self, shape: tuple[int, int], nnz: int) -> int:
        groups, words = self.groups(shape[0]), self.words(shape[1])
        masks = groups * words * self.rows * self.word // 8
        return masks + (nnz + _TAIL) * self.value_bits // 8 + 4 * (groups + 1)

    def fits(self, stats: WeightStats) -> str | None:
        if stats.nnz > torch.iinfo(torch.int32).max:
            return f"{stats.nnz} nonzeros do not fit 32-bit offsets"
        if self.value_bits == 16 and not stats.bf16_exact:
            return INEXACT_IN_BFLOAT16
        return None

    @property
    def _mask_dtype(self) -> type:
        return np.int16 if self.value_bits == 32 else np.int32

    def _bits(self, packed: dict[str, torch.Tensor]) -> np.ndarray:
        """The bits as booleans ``[groups, words, rows, word]``."""
        masks = np.ascontiguousarray(packed["masks"].numpy())[..., None]
        flat = masks.view(np.uint8)
        return np.unpackbits(flat, axis=-1, bitorder="little").view(np.bool_)

    def _in_order(self, padded: np.ndarray) -> np.ndarray:
        """``[groups, rows, words, word]`` by column to ``[groups, words, rows, word]`` by bit."""
        words = padded.transpose(0, 2, 1, 3)
        if self.value_bits == 16:
            words = words.reshape(*words.shape[:3], 2, 16).swapaxes(3, 4)
        return np.ascontiguousarray(words).reshape(*words.shape[:3], self.word)

    def _in_place(self, ordered: np.ndarray) -> np.ndarray:
        """The reverse, as a matrix with its padding."""
        groups, words, rows, word = ordered.shape
        if self.value_bits == 16:
            ordered = ordered.reshape(groups, words, rows, 16, 2).swapaxes(3, 4)
        ordered = ordered.reshape(groups, words, rows, word).transpose(0, 2, 1, 3)
        return ordered.reshape(groups * rows, words * word)
