"""Attention of ONNX Runtime: Attention, MultiHeadAttention, and rotary embedding."""

from __future__ import annotations

import torch

from sparsify.frontend.onnx.attend import (
    Scores,
    attend,
    both,
    causal,
    merge_heads,
    split_heads,
)
from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.operators.microsoft_quantized import matmul_integer_to_float
from sparsify.frontend.onnx.registry import MICROSOFT, Unsupported, operator
from sparsify.frontend.onnx.rotate import rotate, rotate_heads


@operator("Attention", domain=MICROSOFT)
def attention(
    node: Node,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    past: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
    past_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The projections and self-attention in one; ``past`` holds keys and values."""
    if past_length is not None or node.get("do_rotary", 0):
        raise Unsupported("a past that is shared with the result, or rotary embedding within")
    sizes = node.get("qkv_hidden_sizes") or [weight.shape[1] // 3] * 3
    projected = torch.nn.functional.linear(x, weight.t(), bias)
    return _self_attention(node, projected, sizes, mask, past, added)


@operator("QAttention", domain=MICROSOFT)
def quantised_attention(
    node: Node,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    mask: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    weight_zero: torch.Tensor | None = None,
    past: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """`attention` whose projections are a product of integers; the rest is float32."""
    if node.get("do_rotary", 0):
        raise Unsupported("rotary embedding within")
    projected = matmul_integer_to_float(
        node, x, weight, x_scale, weight_scale, x_zero, weight_zero, bias
    )
    return _self_attention(node, projected, [weight.shape[1] // 3] * 3, mask, past, None)


def _self_attention(
    node: Node,
    projected: torch.Tensor,
    sizes: list[int],
    mask: torch.Tensor | None,
    past: torch.Tensor | None,
    added: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    heads = node.require("num_heads")
    query, key, value = (split_heads(part, heads) for part in projected.split(sizes, -1))
    if past is not None:
        key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
    queries, keys = query.shape[2], key.shape[2]
    visible = None if mask is None else key_mask(mask, queries, keys)
    if node.get("unidirectional", 0):
        visible = both(visible, causal(queries, keys, keys - queries))
    y = attend(query, key, value, visible, added, Scores(node.get("scale") or None))
    present = (torch.stack([key, value]),) if node.wants(1) else ()
    return (merge_heads(y), *present)


@operator("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(
    node: Node,
    query: torch.Tensor,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
    past_key: torch.Tensor | None = None,
    past_value: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Attention over projections that are given apart, or packed with one another."""
    heads = node.require("num_heads")
    query, key, value = _unpacked(query, key, value)
    if bias is not None:
        widths = [t.shape[-1] if t.dim() == 3 else 0 for t in (query, key, value)]
        if 0 in widths:
            raise Unsupported("a bias of keys that are split into heads already")
        parts = bias.split(widths)
        query, key, value = (t + b for t, b in zip((query, key, value), parts, strict=True))
    q, k, v = (t if t.dim() == 4 else split_heads(t, heads) for t in (query, key, value))
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    queries, keys = q.shape[2], k.shape[2]
    visible = None if mask is None else key_mask(mask, queries, keys)
    if node.get("unidirectional", 0):
        visible = both(visible, causal(queries, keys, keys - queries))
    y = attend(q, k, v, visible, added, Scores(node.get("scale") or None))
    return merge_heads(y), k, v


def _unpacked(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From ``[batch, length, heads, 3 or 2, size]`` where projections are packed."""
    if query.dim() == 5:
        query, key, value = (part.flatten(2) for part in query.unbind(3))
    elif key is not None and key.dim() == 5:
        key, value = (part.flatten(2) for part in key.unbind(3))
    if key is None or value is None:
        raise Unsupported("a query without key and value")
    return query, key, value


def key_mask(mask: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """Which keys are no padding, broadcastable to ``[batch, heads, queries, keys]``.

    Args:
        mask: the number of keys of each row, ``[batch]``, or, where it is not 0, the keys that
            count: ``[batch, keys]``, ``[batch, queries, keys]`` or ``[batch, 1, keys, keys]``.
    """
    if mask.dim() == 1:
        return torch.arange(keys) < mask.reshape(-1, 1, 1, 1)
    seen = mask != 0
    if mask.dim() == 2:
        return seen[:, None, None, :]
    if mask.dim() == 3:
        return seen[:, None]
    return seen[..., keys - queries : keys, :keys]


@operator("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding(
    node: Node, x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Positions are ``[batch, length]``, or that of the first token of all rows, ``[1]``."""
    length = x.shape[2] if x.dim() == 4 else x.shape[1]
    if positions.dim() == 1:
        positions = positions.reshape(1, 1) + torch.arange(length)
    cos, sin = (torch.nn.functional.embedding(positions, t) for t in (cos, sin))
    if x.dim() == 4:
        size = node.get("rotary_embedding_dim", 0)
        interleaved = bool(node.get("interleaved", 0))
        return rotate(x, cos.unsqueeze(1), sin.unsqueeze(1), size, interleaved)
    size = node.get("rotary_embedding_dim", 0)
    heads = node.get("num_heads", 0) or x.shape[-1] // (size or 2 * cos.shape[-1])
    return rotate_heads(node, x, heads, cos, sin)
