"""LinearAttention: a state that each token updates and reads, unrolled over static lengths."""

from __future__ import annotations

import torch

from sparsify.frontend.onnx.attend import merge_heads, split_heads
from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import NeedsSizes, operator


@operator("LinearAttention", since=27)
@operator("LinearAttention", domain="com.microsoft")
def linear_attention(
    node: Node,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor | None = None,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``S = exp(g) S + k (beta (v - S^T k))^T`` and ``y = scale * S^T q`` for each token.

    Without decay or beta (the other update rules) these parts fall away; computed in float32.
    """
    heads, kv_heads = node.require("q_num_heads"), node.require("kv_num_heads")
    dtype, size = query.dtype, query.shape[-1] // heads
    length = query.shape[1]
    if not isinstance(length, int):
        raise NeedsSizes(f"a sequence of dynamic length {length}")
    q = split_heads(query, heads).float()
    k, v = split_heads(key, kv_heads).float(), split_heads(value, kv_heads).float()
    scale = node.get("scale", 0.0) or size**-0.5
    kept = dtype if state is None else state.dtype
    current = k.new_zeros(k.shape[0], kv_heads, size, v.shape[-1])
    current = current if state is None else state.float()
    outputs = []
    for t in range(length):
        row = v[:, :, t]
        if decay is not None:
            # [batch, heads] or [batch, heads * size], one for each row of the state or for all.
            gate = decay[:, t].float().unflatten(-1, (kv_heads, -1)).exp()
            current = current * gate.unsqueeze(-1)
        if beta is not None:
            known = (k[:, :, t].unsqueeze(-2) @ current).squeeze(-2)
            row = beta[:, t].float().unsqueeze(-1) * (row - known)
        current = current + k[:, :, t].unsqueeze(-1) * row.unsqueeze(-2)
        read = current.repeat_interleave(heads // kv_heads, 1) if heads != kv_heads else current
        outputs.append((q[:, :, t].unsqueeze(-2) @ read).squeeze(-2) * scale)
    y = merge_heads(torch.stack(outputs, 2)).to(dtype)
    return y, current.to(kept)
