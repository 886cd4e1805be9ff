"""Attention, against float64 head by head."""

import math

import torch

from sparsify import ops
from sparsify.block_mask import BlockMask
from tests.ops.eager.case import TOKENS, Case, in_form


def cases(lanes: bool) -> list[Case]:
    return [*masked_cases(lanes), *banded_cases(lanes), *block_cases(lanes)]


def masked_cases(lanes: bool) -> list[Case]:
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


def banded_cases(lanes: bool) -> list[Case]:
    """Windows, sinks and soft caps, with a mask besides."""
    found = []
    for batch, length, causal, window, sinks, softcap in (
        (2, 9, True, 3, 0, 0.0),
        (1, 17, True, 4, 2, 1.5),
        (3, 5, False, 2, 1, 0.0),
        (1, 8, False, 0, 0, 2.0),
    ):
        query, memory = torch.randn(batch, length, 13), torch.randn(batch, length + 1, 17)
        i, j = torch.arange(length)[:, None], torch.arange(length + 1)
        seen = (j <= i) | torch.tensor(not causal)
        seen = seen & ((abs(i - j) < window) | (j < sinks)) if window else seen
        mask = torch.randn(batch, 4, length, length + 1)
        hidden = mask.masked_fill(~seen, -math.inf)
        y = attention(query, memory, hidden, [1, 2, 8], 0.4, False, softcap)
        if lanes:
            query, memory = ops.to_lanes.reference(query), ops.to_lanes.reference(memory)
        args = (query, memory, memory, mask, 4, 2, 3, [1, 2, 8], 0.4, causal)
        args = (*args, [batch, length, length + 1] if lanes else [], window, sinks, softcap)
        label = f"{batch}x{length}-{causal}-{window}-{sinks}-{softcap}"
        found.append(Case("fused_attention", args, in_form(y, lanes), label=label))
    return found


def block_cases(lanes: bool) -> list[Case]:
    """Random blocks, one list a key head, some queries without any."""
    found = []
    for number, (batch, length) in enumerate([*TOKENS, (2, 37)]):
        keys, block = length + 40, (32, 16)
        query, memory = torch.randn(batch, length, 13), torch.randn(batch, keys, 17)
        shape = (batch, 2, -(-length // 32), -(-keys // 16))
        kinds = torch.randint(0, 3, shape, dtype=torch.int8)
        causal, softcap = number % 2 == 1, [0.0, 0.0, 1.5][number % 3]
        masks = [None, torch.rand(batch, 1, 1, keys) > 0.3, torch.randn(batch, 4, length, keys)]
        mask = masks[number % 3]
        kind = kinds.repeat_interleave(2, 1)[:, :, torch.arange(length) // 32]
        kind = kind[..., torch.arange(keys) // 16]
        rule = torch.zeros(kind.shape) if mask is None else mask
        rule = torch.where(rule, 0.0, -math.inf) if rule.dtype == torch.bool else rule
        later = torch.arange(keys) > torch.arange(length)[:, None]
        rule = rule.masked_fill(later & torch.tensor(causal), -math.inf)
        added = torch.where(kind == 2, 0.0, torch.where(kind == 1, rule, -math.inf))
        y = attention(query, memory, added, [1, 2, 8], 0.4, False, softcap).nan_to_num(0.0)
        blocks = BlockMask.of_kinds(kinds, (length, keys), block).tensors
        if lanes:
            query, memory = ops.to_lanes.reference(query), ops.to_lanes.reference(memory)
        args = (query, memory, memory, blocks, mask, 4, 2, 3, [1, 2, 8], 0.4, block, causal)
        args = (*args, 0, 0, softcap, 0.0, [batch, length, keys] if lanes else [])
        label = f"{batch}x{length}x{keys}"
        found.append(Case("block_attention", args, in_form(y, lanes), label=label))
    return found


def attention(query, memory, mask, offsets, scale, causal, softcap=0.0):
    """Head by head in float64: 4 query heads of 3 features over 2 key heads."""
    heads = []
    for head in range(4):
        q = query[..., offsets[0] + head * 3 :][..., :3].double()
        k = memory[..., offsets[1] + head // 2 * 3 :][..., :3].double()
        v = memory[..., offsets[2] + head // 2 * 3 :][..., :3].double()
        scores = q @ k.mT * scale
        if softcap:
            scores = (scores / softcap).tanh() * softcap
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
