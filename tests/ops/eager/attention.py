"""Attention, against float64 head by head."""

import math

import torch

from sparsify import ops
from tests.ops.eager.case import TOKENS, Case, in_form


def cases(lanes: bool) -> list[Case]:
    found = []
    for number, (batch, length) in enumerate(TOKENS):
        keys = length + 3 * (number % 2)
        causal = number == 2
        query, memory = torch.randn(batch, length, 13), torch.randn(batch, keys, 17)
        masks = [
            None,
            torch.rand(batch, 1, 1, keys) > 0.3,
            torch.randn(batch, 4, length, keys),
            torch.randn(1, 1, length, keys),
        ]
        mask = masks[number % len(masks)]
        if mask is not None and mask.dtype == torch.bool:
            mask[..., 0] = True
        offsets, scale = [1, 2, 8], 0.4
        y = attention(query, memory, mask, offsets, scale, causal)
        extents = [batch, length, keys] if lanes else []
        if lanes:
            query, memory = ops.to_lanes.reference(query), ops.to_lanes.reference(memory)
        args = (query, memory, memory, mask, 4, 2, 3, offsets, scale, causal, extents)
        label = f"{batch}x{length}x{keys}"
        found.append(Case("fused_attention", args, in_form(y, lanes), label=label))
    return found


def attention(query, memory, mask, offsets, scale, causal):
    """Head by head in float64: 4 query heads of 3 features over 2 key heads."""
    heads = []
    for head in range(4):
        q = query[..., offsets[0] + head * 3 :][..., :3].double()
        k = memory[..., offsets[1] + head // 2 * 3 :][..., :3].double()
        v = memory[..., offsets[2] + head // 2 * 3 :][..., :3].double()
        scores = q @ k.mT * scale
        if mask is not None:
            own = mask.expand(query.shape[0], 4, *scores.shape[1:])[:, head]
            scores = (
                scores.masked_fill(~own, -math.inf) if own.dtype == torch.bool else scores + own
            )
        if causal:
            hidden = torch.arange(scores.shape[2]) > torch.arange(scores.shape[1])[:, None]
            scores = scores.masked_fill(hidden, -math.inf)
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, -1).float()
