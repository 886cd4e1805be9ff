"""Attention and RotaryEmbedding of ONNX itself."""

from __future__ import annotations

from typing import Any

import torch

from sparsify.frontend.onnx.attend import (
    Scores,
    attend,
    attend_in_steps,
    both,
    merge_heads,
    repeat_heads,
    split_heads,
    window,
)
from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import Unsupported, operator
from sparsify.frontend.onnx.rotate import rotate, rotate_heads
from sparsify.frontend.onnx.tensors import computed_type


@operator("Attention", since=23)
def attention(
    node: Node,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    past_key: torch.Tensor | None = None,
    past_value: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    merged = query.dim() == 3
    if merged:
        kv_heads = node.require("kv_num_heads")
        query = split_heads(query, node.require("q_num_heads"))
        key, value = split_heads(key, kv_heads), split_heads(value, kv_heads)
    if past_key is not None and past_value is not None:
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    visible = _visible(node, queries, keys, past_key, lengths)
    bias = None
    if mask is not None:
        mask = _padded(mask, keys)
        if mask.dtype == torch.bool:
            visible = both(visible, mask)
        else:
            bias = mask
    precision = node.get("softmax_precision")
    scores = Scores(
        node.get("scale"),
        node.get("softcap", 0.0),
        None if precision is None else computed_type(precision),
    )
    operands = (query, repeat_heads(key, heads), repeat_heads(value, heads), visible, bias, scores)
    shown: tuple[torch.Tensor, ...] = ()
    if node.wants(3):
        y, *steps = attend_in_steps(*operands)
        shown = (steps[node.get("qk_matmul_output_mode", 0)],)
    else:
        y = attend(*operands)
    return (merge_heads(y) if merged else y, key, value, *shown)


def _visible(
    node: Node,
    queries: int,
    keys: int,
    past_key: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> torch.Tensor | None:
    """What causality, windows and the number of valid keys let each query see."""
    left, right = node.get("left_window_size", -1), node.get("right_window_size", -1)
    if left < -1 or right < -1:
        raise Unsupported(f"windows of {left} to the left and {right} to the right")
    if node.get("is_causal", 0):
        right = 0
    visible = None
    if left >= 0 or right >= 0:
        offset: Any = 0 if past_key is None else past_key.shape[2]
        if past_key is None and lengths is not None:
            offset = lengths - queries
        visible = window(queries, keys, offset, left, right)
    if lengths is not None:
        visible = both(visible, torch.arange(keys) < lengths.reshape(-1, 1, 1, 1))
    return visible


def _padded(mask: torch.Tensor, keys: int) -> torch.Tensor:
    """The mask for all keys: those it does not tell of are hidden."""
    missing = keys - mask.shape[-1]
    if isinstance(missing, int) and missing <= 0:
        return mask
    hidden = False if mask.dtype == torch.bool else float("-inf")
    return torch.cat([mask, mask.new_full((*mask.shape[:-1], missing), hidden)], -1)


@operator("RotaryEmbedding", since=23)
def rotary_embedding(
    node: Node,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    if x.dim() == 3:
        return rotate_heads(node, x, node.require("num_heads"), cos, sin)
    size = node.get("rotary_embedding_dim", 0)
    return rotate(x, cos.unsqueeze(1), sin.unsqueeze(1), size, bool(node.get("interleaved", 0)))
