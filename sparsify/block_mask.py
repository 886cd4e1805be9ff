"""Which blocks of keys each block of queries sees: the one form of sparse attention.

A block of scores is hidden, partial (some of its scores are seen, by a rule for single queries and
keys) or full. Partial and full blocks are listed for each block of queries, as FlexAttention lists
them; hidden blocks are in no list and cost nothing. Everything past the last query or key counts as
whatever it must for a block to be hidden or full.

Source: Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention
Kernels", 2024.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from sparsify.band import Band

BLOCK = 64
"""Queries and keys of a block, unless another size is asked for: what kernels take at a time."""

HIDDEN, PARTIAL, FULL = 0, 1, 2

_MULTIPLES = (32, 16)
"""Of queries, whole tiles of a kernel; of keys, whole lane groups."""

_AT_ONCE = 1 << 24
"""Elements of a mask that are evaluated together: bounds the memory of building."""

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``(batch, head, query, key)`` -> whether seen, on index tensors that broadcast."""


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The blocks that are computed, for each batch (or one for all) and head (or fewer for all).

    Attributes:
        counts: int32 ``[batch, heads, query_blocks]``, partial blocks of keys.
        indices: int32 ``[batch, heads, query_blocks, most]``, which, ascending; the rest is zero.
        full_counts, full_indices: likewise, of the full blocks.
        block: queries and keys of a block; multiples of 32 and of 16.
        lengths: queries and keys in all; the last blocks may be shorter.
        mask_mod: what is seen in partial blocks; None: unknown here, a mask tensor says it.
    """

    counts: torch.Tensor
    indices: torch.Tensor
    full_counts: torch.Tensor
    full_indices: torch.Tensor
    block: tuple[int, int]
    lengths: tuple[int, int]
    mask_mod: MaskMod | None = None

    @classmethod
    def of_kinds(
        cls,
        kinds: torch.Tensor,
        lengths: tuple[int, int],
        block: tuple[int, int] = (BLOCK, BLOCK),
        mask_mod: MaskMod | None = None,
    ) -> BlockMask:
        """From `HIDDEN`, `PARTIAL` or `FULL` of each block, ``[batch, heads, rows, columns]``.

        Raises:
            ValueError: for blocks that are no such multiples, or a number of them that does not
                cover ``lengths``.
        """
        expected = _blocks_of(lengths, block)
        if kinds.dim() != 4 or tuple(kinds.shape[2:]) != expected:
            raise ValueError(
                f"BlockMask: kinds have shape {tuple(kinds.shape)}; {lengths[0]} queries and "
                f"{lengths[1]} keys in blocks of {block[0]}x{block[1]} need "
                f"[batch, heads, {expected[0]}, {expected[1]}]"
            )
        lists = (*_listed(kinds == PARTIAL), *_listed(kinds == FULL))
        return cls(*lists, block, lengths, mask_mod)

    @classmethod
    def of_band(
        cls, band: Band, lengths: tuple[int, int], block: tuple[int, int] = (BLOCK, BLOCK)
    ) -> BlockMask:
        """Of a window, sinks and causality, in closed form: no element is looked at."""
        return _of_band(band, lengths, block)

    @classmethod
    def of_mask_mod(
        cls,
        mask_mod: MaskMod,
        lengths: tuple[int, int],
        batch: int = 1,
        heads: int = 1,
        block: tuple[int, int] = (BLOCK, BLOCK),
    ) -> BlockMask:
        """Of a function of indices; evaluated in runs of query blocks, at most 16M elements each.

        Results are kept for the latest shapes of a `Band`, and of functions that have no state of
        their own, so pass the same function object.

        Args:
            batch, heads: 1 where the function does not look at that index.
        """
        if isinstance(mask_mod, Band):
            return _of_band(mask_mod, lengths, (block[0], block[1]))
        make = _of_mask_mod if _is_stateless(mask_mod) else _evaluated
        return make(mask_mod, lengths, batch, heads, (block[0], block[1]))

    @classmethod
    def of_dense(cls, mask: torch.Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> BlockMask:
        """Of a bool mask ``[batch, heads, queries, keys]``, True where seen.

        Raises:
            TypeError, ValueError: the mask is of floats, or has other dimensions.
        """
        if mask.dtype != torch.bool:
            raise TypeError(
                f"BlockMask.of_dense: the mask is {mask.dtype}; give a bool one, True where seen: "
                "of a mask that is added, `mask == 0`"
            )
        if mask.dim() != 4:
            raise ValueError(
                f"BlockMask.of_dense: the mask has shape {tuple(mask.shape)}; it must be [batch, "
                "heads, queries, keys], with 1 for what all share"
            )
        batch, heads, queries, keys = mask.shape

        def mask_mod(
            b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
        ) -> torch.Tensor:
            return mask[b, h, q, k]

        return _evaluated(mask_mod, (queries, keys), batch, heads, (block[0], block[1]))

    @classmethod
    def of_flex(cls, mask: Any) -> BlockMask:
        """From `torch.nn.attention.flex_attention.BlockMask`."""
        counts, indices = mask.kv_num_blocks, mask.kv_indices
        full_counts, full_indices = mask.full_kv_num_blocks, mask.full_kv_indices
        if full_counts is None:
            full_counts, full_indices = torch.zeros_like(counts), torch.zeros_like(indices[..., :1])
        lists = (*_trimmed(counts, indices), *_trimmed(full_counts, full_indices))
        return cls(*lists, tuple(mask.BLOCK_SIZE), tuple(mask.seq_lengths), mask.mask_mod)

    def to_flex(self) -> Any:
        """As `torch.nn.attention.flex_attention.BlockMask`."""
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        columns = _blocks_of(self.lengths, self.block)[1]
        widened = [
            torch.nn.functional.pad(indices, (0, columns - indices.shape[-1]))
            for indices in (self.indices, self.full_indices)
        ]
        return FlexBlockMask.from_kv_blocks(
            self.counts,
            widened[0],
            self.full_counts,
            widened[1],
            BLOCK_SIZE=self.block,
            mask_mod=self.mask_mod,
            seq_lengths=self.lengths,
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """As the operators take them."""
        return [self.counts, self.indices, self.full_counts, self.full_indices]

    @cached_property
    def kinds(self) -> torch.Tensor:
        """`HIDDEN`, `PARTIAL` or `FULL` of each block, int8 ``[batch, heads, rows, columns]``."""
        return block_kinds(self.tensors, _blocks_of(self.lengths, self.block)[1])

    @property
    def density(self) -> float:
        """The share of blocks that are computed."""
        computed = int(self.counts.sum()) + int(self.full_counts.sum())
        return computed / self.kinds.numel()

    def to_dense(self) -> torch.Tensor:
        """Bool ``[batch, heads, queries, keys]``, True where seen; for tests and small sizes.

        Raises:
            ValueError: where there are partial blocks and no `mask_mod`.
        """
        (queries, keys), kinds = self.lengths, self.kinds
        spread = spread_kinds(kinds, self.block, self.lengths)
        if self.mask_mod is None:
            if bool(self.counts.any()):
                raise ValueError(
                    "BlockMask: what partial blocks hold is in a mask tensor, not here; give the "
                    "block mask a mask_mod"
                )
            return spread == FULL
        b, h = (torch.arange(n) for n in kinds.shape[:2])
        seen = self.mask_mod(
            b[:, None, None, None], h[:, None, None], torch.arange(queries)[:, None],
            torch.arange(keys),
        )  # fmt: skip
        return (spread == FULL) | ((spread == PARTIAL) & seen)


def block_kinds(blocks: list[torch.Tensor], columns: int) -> torch.Tensor:
    """`HIDDEN`, `PARTIAL` or `FULL`, int8 ``[batch, heads, rows, columns]``, of the four lists."""
    counts, indices, full_counts, full_indices = blocks
    kinds = torch.zeros((*counts.shape, columns), dtype=torch.int8)
    for number, listed, kind in ((counts, indices, PARTIAL), (full_counts, full_indices, FULL)):
        valid = torch.arange(listed.shape[-1]) < number[..., None]
        # What is behind a list's end goes to a column that is cut off.
        place = torch.where(valid, listed.long(), columns)
        marks = torch.zeros((*counts.shape, columns + 1), dtype=torch.bool)
        marks.scatter_(-1, place, True)
        kinds[marks[..., :columns]] = kind
    return kinds


def spread_kinds(
    kinds: torch.Tensor, block: tuple[int, int], lengths: tuple[int, int]
) -> torch.Tensor:
    """The kind of each score's block, ``[..., queries, keys]``."""
    wide = kinds.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : lengths[0], : lengths[1]]


def check_block(block: Sequence[int]) -> None:
    """Refuses sizes of blocks that kernels cannot read whole."""
    sound = len(block) == 2 and all(
        n > 0 and n % m == 0 for n, m in zip(block, _MULTIPLES, strict=True)
    )
    if not sound:
        raise ValueError(
            f"block sizes {tuple(block)}: there must be two, queries as a multiple of "
            f"{_MULTIPLES[0]} and keys as one of {_MULTIPLES[1]}"
        )


def _blocks_of(lengths: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    check_block(block)
    rows, columns = (-(-length // size) for length, size in zip(lengths, block, strict=True))
    return rows, columns


def _listed(marks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many are marked, their indices first and zeros after them), int32."""
    counts = marks.sum(-1, dtype=torch.int32)
    order = torch.sort(marks, dim=-1, descending=True, stable=True).indices
    return _trimmed(counts, order.to(torch.int32))


def _trimmed(counts: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As many columns as the longest list has, at least one; zeros behind a list's end."""
    most = max(int(counts.max()), 1) if counts.numel() else 1
    valid = torch.arange(most) < counts[..., None]
    return counts.int().contiguous(), (indices[..., :most] * valid).int().contiguous()


@lru_cache(maxsize=64)
def _of_band(band: Band, lengths: tuple[int, int], block: tuple[int, int]) -> BlockMask:
    rows, columns = _blocks_of(lengths, block)
    q = torch.arange(rows)[:, None] * block[0]
    k = torch.arange(columns) * block[1]
    last_q = (q + block[0]).clamp(max=lengths[0]) - 1
    last_k = (k + block[1]).clamp(max=lengths[1]) - 1
    some, every = band.of_ranges(q, last_q, k, last_k)
    kinds = some.to(torch.int8) * PARTIAL + every.to(torch.int8) * (FULL - PARTIAL)
    return BlockMask.of_kinds(kinds[None, None], lengths, block, band)


def _is_stateless(mask_mod: MaskMod) -> bool:
    """Whether a function gives the same for ever: plain, and closed over numbers at most."""
    if not inspect.isfunction(mask_mod):
        return False
    held = [cell.cell_contents for cell in mask_mod.__closure__ or ()]
    return all(isinstance(value, int | float | None) for value in held)


@lru_cache(maxsize=32)
def _of_mask_mod(
    mask_mod: MaskMod, lengths: tuple[int, int], batch: int, heads: int, block: tuple[int, int]
) -> BlockMask:
    return _evaluated(mask_mod, lengths, batch, heads, block)


def _evaluated(
    mask_mod: MaskMod, lengths: tuple[int, int], batch: int, heads: int, block: tuple[int, int]
) -> BlockMask:
    rows, columns = _blocks_of(lengths, block)
    kinds = torch.empty((batch, heads, rows, columns), dtype=torch.int8)
    run = max(1, _AT_ONCE // max(1, block[0] * columns * block[1]))
    # Indices past an end repeat the last one, which changes neither "some" nor "every".
    k = torch.arange(columns * block[1]).clamp(max=lengths[1] - 1)
    for b in range(batch):
        for h in range(heads):
            for first in range(0, rows, run):
                last = min(rows, first + run)
                q = torch.arange(first * block[0], last * block[0]).clamp(max=lengths[0] - 1)
                seen = mask_mod(torch.tensor(b), torch.tensor(h), q[:, None], k)
                seen = seen.expand(q.numel(), k.numel())
                tiles = seen.unflatten(1, (columns, block[1])).unflatten(0, (-1, block[0]))
                some, every = tiles.any(3).any(1), tiles.all(3).all(1)
                kinds[b, h, first:last] = some.to(torch.int8) + every.to(torch.int8)
    return BlockMask.of_kinds(kinds, lengths, block, mask_mod)
