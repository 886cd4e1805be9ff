"""GroupQueryAttention, the attention of language models in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sparsify.frontend.onnx.attend import (
    Scores,
    attend,
    merge_heads,
    repeat_heads,
    split_heads,
    window,
)
from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import MICROSOFT, Unsupported, operator
from sparsify.frontend.onnx.rotate import rotate


@operator("GroupQueryAttention", domain=MICROSOFT, host=("total",))
def group_query_attention(
    node: Node,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
    lengths: torch.Tensor,
    total: np.ndarray,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Causal attention that writes its keys and values behind those of each row.

    Args:
        query: ``[batch, length, heads * size]``, or query, key and value one after the other.
        lengths: of each row with the new tokens, less 1, ``[batch]``.
        total: of the longest row.
    """
    for option in ("smooth_softmax", "qk_output"):
        if node.get(option, 0):
            raise Unsupported(option)
    heads, kv_heads = node.require("num_heads"), node.require("kv_num_heads")
    if key is None or value is None:
        size = query.shape[-1] // (heads + 2 * kv_heads)
        query, key, value = query.split([heads * size, kv_heads * size, kv_heads * size], -1)
    q = split_heads(query, heads)
    k, v = split_heads(key, kv_heads), split_heads(value, kv_heads)
    length, longest = q.shape[2], total.reshape(-1)[0]
    start = _start(lengths, length, longest)
    if node.get("do_rotary", 0):
        if cos is None or sin is None:
            raise Unsupported("rotary embedding without its tables")
        at = start + torch.arange(length) if positions is None else positions
        cos, sin = (F.embedding(at, t).unsqueeze(1) for t in (cos, sin))
        turned = bool(node.get("rotary_interleaved", 0))
        size = 2 * cos.shape[-1]
        q, k = (rotate(t, cos, sin, size, turned) for t in (q, k))
    k, v = _appended(past_key, k, start, longest), _appended(past_value, v, start, longest)
    visible = window(length, k.shape[2], start, node.get("local_window_size", -1) - 1, 0)
    scores = Scores(node.get("scale") or None, node.get("softcap", 0.0))
    y = attend(q, repeat_heads(k, heads), repeat_heads(v, heads), visible, added, scores)
    return merge_heads(y), k, v


def _start(lengths: torch.Tensor, length: Any, longest: Any) -> torch.Tensor:
    """The place of each row's first new token, ``[batch, 1]``; a prompt begins at 0."""
    if isinstance(longest, int) and isinstance(length, int) and longest == length:
        return torch.zeros_like(lengths).long().reshape(-1, 1)
    start = lengths.long().reshape(-1, 1) + 1 - length
    return start.clamp(min=0)


def _appended(
    past: torch.Tensor | None, new: torch.Tensor, start: torch.Tensor, longest: Any
) -> torch.Tensor:
    """``new`` written from ``start`` on into a past that is grown to the longest row."""
    if past is None or (isinstance(past.shape[2], int) and past.shape[2] == 0):
        return new
    size = torch.sym_max(past.shape[2], longest)
    grown = torch.cat(
        [past, past.new_zeros(*past.shape[:2], size - past.shape[2], new.shape[3])], 2
    )
    place = (start + torch.arange(new.shape[2])).reshape(-1, 1, new.shape[2], 1)
    return grown.scatter(2, place.expand(new.shape), new)
