"""Attention with every kind of mask, window and soft cap."""

from collections.abc import Iterator
from itertools import product

import torch

from sparsify.ops.onnx.attention import attention
from tests.ops.domain.case import HEAD_DIM, HEADS, KV_HEADS, TOKENS, Case, call, of


def cases() -> Iterator[Case]:
    yield from masked_cases()
    yield from banded_cases()


def masked_cases() -> Iterator[Case]:
    for (batch, length), causal in product(TOKENS, (False, True)):
        keys = length + 2
        query, memory = torch.randn(batch, length, 13), torch.randn(batch, keys, 17)
        seen = torch.rand(batch, 1, length, keys) > 0.4
        seen[-1, :, 0] = False  # a query that sees nothing
        masks = {
            "none": [None],
            "mask": [seen, torch.rand(1, HEADS, 1, keys) > 0.3],
            "bias": [torch.randn(batch, HEADS, length, keys).masked_fill(~seen, -torch.inf)],
        }
        for mask_kind, mask in [(kind, mask) for kind, own in masks.items() for mask in own]:
            operator = attention(mask_kind, causal)
            attributes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
            attributes |= {"offsets": [1, 2, 8], "scale": 0.4}
            args = (query, memory, memory, mask, HEADS, KV_HEADS, HEAD_DIM, [1, 2, 8], 0.4, causal)
            inputs = {"query": query, "key": memory, "value": memory, "mask": mask}
            yield Case(
                operator, of(operator, inputs), attributes, (call("fused_attention", *args),)
            )


def banded_cases() -> Iterator[Case]:
    """Windows and soft caps, of every mask; some queries see nothing."""
    kinds = [k for k in product(("none", "mask", "bias"), *([(False, True)] * 3)) if any(k[2:])]
    for number, (mask_kind, causal, windowed, capped) in enumerate(kinds):
        batch, length = TOKENS[number % len(TOKENS)]
        keys = max(1, length - 3)
        query, memory = torch.randn(batch, length, 13), torch.randn(batch, keys, 17)
        seen = torch.rand(batch, 1, length, keys) > 0.4
        masks = {"none": None, "mask": seen}
        masks["bias"] = torch.randn(batch, HEADS, length, keys).masked_fill(~seen, -torch.inf)
        window, sinks = (2, number % 2) if windowed else (0, 0)
        softcap = 1.5 if capped else 0.0
        mask = masks[mask_kind]
        args = (query, memory, memory, mask, HEADS, KV_HEADS, HEAD_DIM, [1, 2, 8], 0.4, causal)
        y = call("fused_attention", *args, [], window, sinks, softcap)
        attributes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
        attributes |= {"offsets": [1, 2, 8], "scale": 0.4}
        attributes |= {"window": window, "sinks": sinks} if windowed else {}
        attributes |= {"softcap": softcap} if capped else {}
        operator = attention(mask_kind, causal, windowed, capped)
        inputs = {"query": query, "key": memory, "value": memory, "mask": mask}
        yield Case(operator, of(operator, inputs), attributes, (y,))
