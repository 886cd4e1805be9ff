"""Attention over a paged cache of keys and values, the explicit state of a language model.

A page holds `PAGE` tokens of one layer. Keys lie features major, tokens in lanes, so that the
scores of a page are contiguous vectors; values lie tokens major. A page table gives the pages of
each sequence in order; pages need no order in memory, so a cache grows without a copy.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsify.layouts import LANES
from sparsify.ops.lanes import from_lanes, lane_groups, to_lanes, token_count
from sparsify.ops.library import declare

PAGE = LANES
"""Tokens of a page."""


@dataclass(frozen=True)
class CacheShape:
    """The static sizes of a model's cache."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * 4 * self.layers * self.kv_heads * self.head_dim

    def of_pages(self, pages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of keys and of values with room for so many pages."""
        leading = (self.layers, pages, self.kv_heads)
        return (*leading, self.head_dim, PAGE), (*leading, PAGE, self.head_dim)

    def zeros(self, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of an empty cache."""
        keys, values = self.of_pages(pages)
        return torch.zeros(keys), torch.zeros(values)


def _fake_append(
    keys: torch.Tensor,
    values: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    layer: int,
    offsets: Sequence[int],
    extents: Sequence[int] = (),
) -> torch.Tensor:
    return torch.empty_like(starts)


@declare(
    "kv_append(Tensor(a!) keys, Tensor(b!) values, Tensor key, Tensor value, Tensor pages, "
    "Tensor starts, Tensor counts, int layer, int[] offsets, SymInt[] extents=[]) -> Tensor",
    _fake_append,
)
def kv_append(
    keys: torch.Tensor,
    values: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    layer: int,
    offsets: Sequence[int],
    extents: Sequence[int] = (),
) -> torch.Tensor:
    """Writes the keys and values of new tokens into their pages.

    Args:
        keys: ``[layers, pages, kv_heads, head_dim, 16]``, changed in place.
        values: ``[layers, pages, kv_heads, 16, head_dim]``, changed in place.
        key, value: ``[batch, length, features]``; the heads begin at feature ``offsets[0]`` and
            ``offsets[1]``. One tensor may serve as both.
        pages: int32 ``[batch, pages_of_a_sequence]``, the page table.
        starts: int64 ``[batch]``, tokens that each sequence holds already.
        counts: int64 ``[batch]``, how many of the ``length`` new tokens are real; the others, at
            the end of a row, are padding and are not written.
        extents: empty for row-major tensors; ``[batch, length]`` when key and value are in lanes.

    Returns:
        int64 ``[batch]``, ``starts + counts``: attention takes it, and so runs after the append.
    """
    _, _, kv_heads, head_dim, _ = keys.shape
    if extents:
        key, value = (from_lanes.reference(x, tuple(extents)) for x in (key, value))
    for row in range(key.shape[0]):
        count = int(counts[row])
        position = int(starts[row]) + torch.arange(count)
        page, slot = pages[row, position // PAGE].long(), position % PAGE

        def heads(x: torch.Tensor, offset: int, row: int = row, count: int = count) -> torch.Tensor:
            part = x[row, :count, offset : offset + kv_heads * head_dim]
            return part.unflatten(-1, (kv_heads, head_dim))

        keys[layer, page, :, :, slot] = heads(key, offsets[0])
        values[layer, page, :, slot] = heads(value, offsets[1])
    return starts + counts


def _fake_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    layer: int,
    heads: int,
    offset: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    extents: Sequence[int] = (),
    selected: torch.Tensor | None = None,
    block: Sequence[int] = (1, 1),
    skip: float = 0.0,
) -> torch.Tensor:
    features = heads * keys.shape[3]
    if extents:
        return query.new_empty((lane_groups(token_count(extents)), features, LANES))
    return query.new_empty((*query.shape[:-1], features))


@declare(
    "paged_attention(Tensor query, Tensor keys, Tensor values, Tensor pages, Tensor lengths, "
    "Tensor counts, int layer, int heads, int offset, float scale, int window=0, "
    "float softcap=0.0, SymInt[] extents=[], Tensor? selected=None, int[] block=[1, 1], "
    "float skip=0.0) -> Tensor",
    _fake_attention,
)
def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    layer: int,
    heads: int,
    offset: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    extents: Sequence[int] = (),
    selected: torch.Tensor | None = None,
    block: Sequence[int] = (1, 1),
    skip: float = 0.0,
) -> torch.Tensor:
    """Causal attention of the newest tokens over the cache, which holds them already.

    Query ``i`` of a row stands at position ``lengths - counts + i`` and sees the keys up to it;
    with a window, only the last ``window`` of them.

    Args:
        query: ``[batch, length, features]``; head ``h`` begins at ``offset + h * head_dim`` and
            reads the key head ``h * kv_heads // heads``.
        keys, values, pages: as `kv_append` takes them.
        lengths: int64 ``[batch]``, tokens in the cache, the new ones included: what `kv_append`
            returned.
        counts: int64 ``[batch]``, how many queries of each row are real; the others give zeros.
        softcap: scores ``s`` become ``softcap * tanh(s / softcap)``; 0: they stay as they are.
        extents: empty for row-major tensors; ``[batch, length]`` when the query is in lanes.
        selected: int32 ``[batch, lists, ceil(length / block[0]), most]``: only the blocks of
            ``block[1]`` pages that the list names are seen, by the ``block[0]`` queries of a list.
            Blocks are numbered in their sequence, ascending, with -1 behind the last, and none
            begins after the sequence; query head ``h`` has the list ``h * lists // heads``. None:
            all.
        skip: kernels of many tokens may leave out blocks of keys by `below_maximum`; 0: none is.
            This reference leaves out none.

    Returns:
        ``[batch, length, heads * head_dim]``, or that in lanes.
    """
    _, _, kv_heads, head_dim, _ = keys.shape
    if extents:
        query = from_lanes.reference(query, tuple(extents))
    y = query.new_zeros((*query.shape[:-1], heads * head_dim))
    for row in range(query.shape[0]):
        total, count = int(lengths[row]), int(counts[row])
        used = pages[row, : -(-total // PAGE)].long()
        k = keys[layer, used].permute(1, 0, 3, 2).flatten(1, 2)[:, :total]
        v = values[layer, used].transpose(0, 1).flatten(1, 2)[:, :total]
        q = query[row, :count, offset : offset + heads * head_dim]
        q = q.unflatten(-1, (heads, head_dim)).transpose(0, 1)
        scores = q @ k.repeat_interleave(heads // kv_heads, 0).transpose(1, 2) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        behind = (total - count + torch.arange(count))[:, None] - torch.arange(total)
        hidden = behind < 0 if not window else (behind < 0) | (behind >= window)
        if selected is not None:
            seen = seen_blocks(selected[row], count, total, block)
            hidden = hidden | ~seen.repeat_interleave(heads // len(seen), 0)
        weights = F.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        # A query that sees no key attends to nothing.
        weights = weights.masked_fill(hidden.all(-1, keepdim=True), 0.0)
        found = weights @ v.repeat_interleave(heads // kv_heads, 0)
        y[row, :count] = found.transpose(0, 1).flatten(1)
    return to_lanes.reference(y) if extents else y


def seen_blocks(
    selected: torch.Tensor, queries: int, keys: int, block: Sequence[int]
) -> torch.Tensor:
    """Bool ``[lists, queries, keys]`` of one sequence's lists of blocks."""
    step = block[1] * PAGE
    # One more than there are, for the entries behind the last.
    marked = torch.zeros(*selected.shape[:2], -(-keys // step) + 1, dtype=torch.bool)
    marked.scatter_(2, selected.long().where(selected >= 0, marked.shape[2] - 1), True)
    spread = marked[..., :-1].repeat_interleave(step, 2)[..., :keys]
    return spread.repeat_interleave(block[0], 1)[:, :queries]
