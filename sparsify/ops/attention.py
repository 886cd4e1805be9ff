"""Multi-head attention on unsplit projections, without the transpositions around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from sparsify.band import Band
from sparsify.block_mask import FULL, HIDDEN, PARTIAL, block_kinds, check_block, spread_kinds
from sparsify.ops.lanes import from_lanes, lane_groups, to_lanes, token_count
from sparsify.ops.library import declare


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    offsets: Sequence[int],
    scale: float,
    causal: bool = False,
    extents: Sequence[int] = (),
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    if extents:
        groups = lane_groups(token_count(extents[:2]))
        return query.new_empty((groups, heads * head_dim, query.shape[2]))
    return query.new_empty((*query.shape[:-1], heads * head_dim))


@declare(
    "fused_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, int heads, "
    "int kv_heads, int head_dim, int[] offsets, float scale, bool causal=False, "
    "SymInt[] extents=[], int window=0, int sinks=0, float softcap=0.0) -> Tensor",
    _fake,
)
def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    offsets: Sequence[int],
    scale: float,
    causal: bool = False,
    extents: Sequence[int] = (),
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """``softmax(q k^T * scale + mask) v`` per head, over the keys that a query sees.

    Args:
        query, key, value: ``[batch, length, features]``; head ``h`` of the query is the features
            ``offsets[0] + h * head_dim`` and on, of key and value ``offsets[1]`` and ``offsets[2]``
            with the head ``h * kv_heads // heads``. One tensor may serve as all three.
        mask: bool (True: attend) or float (added), broadcastable to
            ``[batch, heads, query_length, key_length]``, four-dimensional; None: no mask.
        causal, window, sinks: see `Band`; both are in tokens, and 0 is no window.
        softcap: scores ``s`` become ``softcap * tanh(s / softcap)`` before the mask; 0: they stay.
        extents: empty for row-major tensors; ``[batch, query_length, key_length]`` when query, key
            and value are in lanes, ``[groups, features, 16]``.

    Returns:
        ``[batch, query_length, heads * head_dim]``, or that in lanes; zeros for a query that sees
        no key.
    """
    split = _Split(query, key, value, heads, kv_heads, head_dim, offsets, extents)
    band = Band(causal, window, sinks)
    if band.hides:
        visible = band(0, 0, *split.positions)
        mask = visible if mask is None else _both(mask, visible)
    if not softcap:
        y = F.scaled_dot_product_attention(
            split.query, split.key, split.value, attn_mask=mask, scale=scale
        )
        return split.joined(y)
    y = torch.empty_like(split.query)
    for batch, head, own in split.each(mask):
        y[batch, head] = _head(split.of(batch, head), own, scale, softcap)
    return split.joined(y)


def _fake_block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: list[torch.Tensor],
    mask: torch.Tensor | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    offsets: Sequence[int],
    scale: float,
    block: Sequence[int],
    causal: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    skip: float = 0.0,
    extents: Sequence[int] = (),
) -> torch.Tensor:
    check_block(block)
    return _fake(
        query, key, value, mask, heads, kv_heads, head_dim, offsets, scale, causal, extents
    )


@declare(
    "block_attention(Tensor query, Tensor key, Tensor value, Tensor[] blocks, Tensor? mask, "
    "int heads, int kv_heads, int head_dim, int[] offsets, float scale, int[] block, "
    "bool causal=False, int window=0, int sinks=0, float softcap=0.0, float skip=0.0, "
    "SymInt[] extents=[]) -> Tensor",
    _fake_block,
)
def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: list[torch.Tensor],
    mask: torch.Tensor | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    offsets: Sequence[int],
    scale: float,
    block: Sequence[int],
    causal: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    skip: float = 0.0,
    extents: Sequence[int] = (),
) -> torch.Tensor:
    """`fused_attention` over the blocks of keys that are listed for each block of queries.

    In full blocks every key is seen; in partial ones those that the mask and ``causal``,
    ``window`` and ``sinks`` leave. The softmax runs over what is seen and nothing else.

    Args:
        blocks: int32 ``counts, indices, full_counts, full_indices``, the partial and the full
            blocks, as `BlockMask` has them: ``[batch, heads, query_blocks]`` and ``[..., most]``.
            Fewer lists may serve more heads, as key heads do, and one batch all. A block is listed
            once at most, as partial or as full: kernels do not check it, and count one that is
            listed twice twice; this reference counts it once. A `BlockMask` we make has none.
        mask: read in partial blocks only.
        block: queries and keys of a block, multiples of 32 and of 16.
        skip: a block of keys all of whose scores are lower by more than this than what a tile of
            queries has seen before is left out; 0: none is. The order of lists decides what was
            seen before: partial blocks come first, then full ones. The weights left out are below
            ``exp(-skip)`` each, see `below_maximum`; the reference leaves out none.

    Returns:
        As `fused_attention`.

    Raises:
        ValueError: for sizes of blocks that are no such multiples.
        IndexError: when a list names a block that does not exist or is longer than its row.

    Source: Dong et al., "Flex Attention", 2024; for ``skip`` Zhang et al., "SpargeAttention:
    Accurate and Training-free Sparse Attention Accelerating Any Model Inference", 2025.
    """
    split = _Split(query, key, value, heads, kv_heads, head_dim, offsets, extents)
    lengths = (split.query.shape[2], split.key.shape[2])
    _check_blocks(blocks, lengths, block)
    kinds = block_kinds(blocks, -(-lengths[1] // block[1]))
    visible = Band(causal, window, sinks)(0, 0, *split.positions)
    mask = visible if mask is None else _both(mask, visible)
    y = torch.empty_like(split.query)
    for batch, head, own in split.each(mask):
        assert own is not None
        listed = kinds[batch * kinds.shape[0] // y.shape[0], head * kinds.shape[1] // heads]
        kind = spread_kinds(listed, (block[0], block[1]), lengths)
        if own.dtype == torch.bool:
            seen = (kind == FULL) | ((kind == PARTIAL) & own)
        else:
            seen = own.masked_fill(kind == FULL, 0.0).masked_fill(kind == HIDDEN, float("-inf"))
        y[batch, head] = _head(split.of(batch, head), seen, scale, softcap)
    return split.joined(y)


class _Split:
    """Query, key and value ``[batch, heads, length, head_dim]``; key heads are repeated."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        offsets: Sequence[int],
        extents: Sequence[int],
    ) -> None:
        self._lanes = bool(extents)
        if extents:
            batch, query_length, key_length = extents
            query = from_lanes.reference(query, (batch, query_length))
            key = from_lanes.reference(key, (batch, key_length))
            value = from_lanes.reference(value, (batch, key_length))

        def split(x: torch.Tensor, offset: int, count: int) -> torch.Tensor:
            x = x[..., offset : offset + count * head_dim]
            return x.unflatten(-1, (count, head_dim)).transpose(1, 2)

        self.query = split(query, offsets[0], heads)
        self.key = split(key, offsets[1], kv_heads).repeat_interleave(heads // kv_heads, 1)
        self.value = split(value, offsets[2], kv_heads).repeat_interleave(heads // kv_heads, 1)

    def of(self, batch: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query[batch, head], self.key[batch, head], self.value[batch, head]

    @property
    def positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of queries ``[queries, 1]`` and keys ``[keys]``."""
        return torch.arange(self.query.shape[2])[:, None], torch.arange(self.key.shape[2])

    def each(self, mask: torch.Tensor | None) -> Iterator[tuple[int, int, torch.Tensor | None]]:
        """Every batch and head with its part of the mask: what is large is made for one only."""
        batch, heads, queries = self.query.shape[:3]
        whole = None if mask is None else mask.expand(batch, heads, queries, self.key.shape[2])
        for b in range(batch):
            for h in range(heads):
                yield b, h, None if whole is None else whole[b, h]

    def joined(self, y: torch.Tensor) -> torch.Tensor:
        rows = y.transpose(1, 2).flatten(2).contiguous()
        return to_lanes.reference(rows) if self._lanes else rows


def _head(
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """One head's attention."""
    query, key, value = parts
    scores = query @ key.mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        hidden = float("-inf")
        scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    # Rows of minus infinities alone have no softmax.
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    return F.softmax(scores, -1).masked_fill(blind, 0.0) @ value


def _both(mask: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, float("-inf"))


def _check_blocks(
    blocks: list[torch.Tensor], lengths: tuple[int, int], block: Sequence[int]
) -> None:
    check_block(block)
    rows, columns = (-(-length // size) for length, size in zip(lengths, block, strict=True))
    for counts, indices in (blocks[:2], blocks[2:]):
        if counts.shape[-1] != rows:
            raise ValueError(
                f"block_attention: lists of {counts.shape[-1]} blocks of queries for {lengths[0]} "
                f"queries in blocks of {block[0]}; give {rows} lists"
            )
        listed = torch.arange(indices.shape[-1]) < counts[..., None]
        wrong = (counts < 0) | (counts > indices.shape[-1])
        wrong |= (listed & ((indices < 0) | (indices >= columns))).any(-1)
        if bool(wrong.any()):
            raise IndexError(
                "block_attention: a list of blocks is longer than its row or names a block "
                f"outside the {columns} of {lengths[1]} keys"
            )
