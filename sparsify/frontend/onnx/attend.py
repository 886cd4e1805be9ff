"""Attention as ONNX's several operators define it, written so that the passes recognise it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Extent = Any
"""An int, or a torch.SymInt where a dim is dynamic."""


@dataclass(frozen=True)
class Scores:
    """How scores are made of queries and keys.

    Attributes:
        scale: of ``q k^T``; None for one over the root of the head size.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 for none.
        precision: the softmax is computed in this type; None for that of the scores.
    """

    scale: float | None = None
    softcap: float = 0.0
    precision: torch.dtype | None = None


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[batch, length, heads * size]`` to ``[batch, heads, length, size]``."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, length, size]`` to ``[batch, length, heads * size]``."""
    return x.transpose(1, 2).flatten(2)


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Every key head for each query head that shares it, one after the other."""
    batch, count, length, size = x.shape
    if count == heads:
        return x
    shared = x.unsqueeze(2).expand(batch, count, heads // count, length, size)
    return shared.reshape(batch, heads, length, size)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scores: Scores = Scores(),
) -> torch.Tensor:
    """``softmax(q k^T * scale + bias) v``; a query that sees no key gives zeros.

    Args:
        query, key, value: ``[batch, heads, length, size]``, as many key heads as query heads.
        visible: bool, broadcastable to ``[batch, heads, query_length, key_length]``.
        bias: added to the scores, broadcastable likewise.
    """
    if scores.softcap or scores.precision not in (None, query.dtype):
        return attend_in_steps(query, key, value, visible, bias, scores)[0]
    mask = _combined(visible, bias)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scores.scale)


def attend_in_steps(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    bias: torch.Tensor | None,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Like `attend`; also returns the scores raw, capped, and with the bias, and the softmax."""
    root = (query.shape[-1] ** -0.5 if scores.scale is None else scores.scale) ** 0.5
    raw = (query * root) @ (key * root).transpose(-1, -2)
    capped = torch.tanh(raw / scores.softcap) * scores.softcap if scores.softcap else raw
    biased = capped if bias is None else capped + bias
    if visible is not None:
        biased = biased.masked_fill(~visible, float("-inf"))
    weights = biased.to(scores.precision or biased.dtype).softmax(-1)
    mask = _combined(visible, bias)
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask > float("-inf")
        weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0)
    weights = weights.to(query.dtype)
    return weights @ value, raw, capped, biased, weights


def causal(queries: Extent, keys: Extent, offset: Any) -> torch.Tensor:
    """Key ``j`` is visible to query ``i`` if ``j <= i + offset``; see `window` for offset."""
    return window(queries, keys, offset, -1, 0)


def window(queries: Extent, keys: Extent, offset: Any, left: int, right: int) -> torch.Tensor:
    """Which keys lie at most ``left`` before and ``right`` after a query; -1 is no bound.

    Args:
        offset: position of the first query among the keys: a number, or ``[batch]`` of them.

    Returns:
        bool, ``[queries, keys]``, or ``[batch, 1, queries, keys]``.
    """
    position = torch.arange(queries).unsqueeze(-1)
    if isinstance(offset, torch.Tensor):
        position = position + offset.reshape(-1, 1, 1, 1)
    elif not (isinstance(offset, int) and offset == 0):
        position = position + offset
    key = torch.arange(keys)
    visible = None
    if right >= 0:
        visible = key <= (position + right if right else position)
    if left >= 0:
        near = key >= position - left
        visible = near if visible is None else visible & near
    assert visible is not None
    return visible


def both(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """What both masks let see; None lets see all."""
    if first is None or second is None:
        return first if second is None else second
    return first & second


def _combined(visible: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    """One mask, bool unless there is a bias."""
    if bias is None or visible is None:
        return visible if bias is None else bias
    shape = torch.broadcast_shapes(bias.shape, visible.shape)
    return bias.expand(shape).masked_fill(~visible, float("-inf"))
