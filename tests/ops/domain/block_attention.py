"""Attention over listed blocks, with every kind of mask."""

from collections.abc import Iterator
from itertools import product

import torch

from sparsify.block_mask import BlockMask
from sparsify.ops.onnx.block_attention import block_attention
from tests.ops.domain.case import HEAD_DIM, HEADS, KV_HEADS, Case, call, of


def cases() -> Iterator[Case]:
    """Lists for all heads, for each key head and for each head; some queries see nothing."""
    for number, (mask_kind, capped) in enumerate(product(("none", "mask", "bias"), (False, True))):
        batch, length, keys, block = 2, 37, 50, (32, 16)
        query, memory = torch.randn(batch, length, 13), torch.randn(batch, keys, 17)
        lists = [(1, 1), (batch, KV_HEADS), (1, HEADS)][number % 3]
        kinds = torch.randint(0, 3, (*lists, 2, 4), dtype=torch.int8)
        kinds[0, 0, 1] = 0
        blocks = BlockMask.of_kinds(kinds, (length, keys), block).tensors
        masks = {"none": None, "mask": torch.rand(batch, 1, 1, keys) > 0.4}
        mask = {**masks, "bias": torch.randn(1, HEADS, length, keys)}[mask_kind]
        attributes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
        attributes |= {"offsets": [1, 2, 8], "scale": 0.4, "block": list(block)}
        attributes |= {"causal": number % 2, "window": [0, 9][number // 3], "sinks": number}
        y = call(
            "block_attention", query, memory, memory, blocks, mask, HEADS, KV_HEADS, HEAD_DIM,
            [1, 2, 8], 0.4, block, number % 2 == 1, attributes["window"], number,
            1.5 if capped else 0.0,
        )  # fmt: skip
        attributes |= {"skip": 0.0, **({"softcap": 1.5} if capped else {})}
        names = ("counts", "indices", "full_counts", "full_indices")
        inputs = {"query": query, "key": memory, "value": memory, "mask": mask}
        inputs |= dict(zip(names, blocks, strict=True))
        operator = block_attention(mask_kind, capped)
        yield Case(operator, of(operator, inputs), attributes, (y,))
