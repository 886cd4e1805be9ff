"""Multi-head attention on unsplit projections, without the transpositions around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

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
) -> torch.Tensor:
    if extents:
        groups = lane_groups(token_count(extents[:2]))
        return query.new_empty((groups, heads * head_dim, query.shape[2]))
    return query.new_empty((*query.shape[:-1], heads * head_dim))


@declare(
    "fused_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, int heads, "
    "int kv_heads, int head_dim, int[] offsets, float scale, bool causal=False, "
    "SymInt[] extents=[]) -> Tensor",
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
) -> torch.Tensor:
    """``softmax(q k^T * scale + mask) v`` per head.

    Args:
        query, key, value: ``[batch, length, features]``; head ``h`` of the query is the features
            ``offsets[0] + h * head_dim`` and on, of key and value ``offsets[1]`` and ``offsets[2]``
            with the head ``h * kv_heads // heads``. One tensor may serve as all three.
        mask: bool (True: attend) or float (added), broadcastable to
            ``[batch, heads, query_length, key_length]``, four-dimensional; None: no mask.
        causal: key ``j`` is visible to query ``i`` only if ``j <= i``.
        extents: empty for row-major tensors; ``[batch, query_length, key_length]`` when query, key
            and value are in lanes, ``[groups, features, 16]``.

    Returns:
        ``[batch, query_length, heads * head_dim]``, or that in lanes.
    """
    if extents:
        batch, query_length, key_length = extents
        query = from_lanes.reference(query, (batch, query_length))
        key = from_lanes.reference(key, (batch, key_length))
        value = from_lanes.reference(value, (batch, key_length))

    def split(x: torch.Tensor, offset: int, count: int) -> torch.Tensor:
        x = x[..., offset : offset + count * head_dim]
        return x.unflatten(-1, (count, head_dim)).transpose(1, 2)

    if causal:
        visible = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril()
        mask = visible if mask is None else _both(mask, visible)
    y = F.scaled_dot_product_attention(
        split(query, offsets[0], heads),
        split(key, offsets[1], kv_heads).repeat_interleave(heads // kv_heads, 1),
        split(value, offsets[2], kv_heads).repeat_interleave(heads // kv_heads, 1),
        attn_mask=mask,
        scale=scale,
    )
    rows = y.transpose(1, 2).flatten(2).contiguous()
    return to_lanes.reference(rows) if extents else rows


def _both(mask: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, float("-inf"))
