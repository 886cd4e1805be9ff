"""The paged cache."""

from collections.abc import Iterator

import torch

from sparsify.ops import PAGE
from sparsify.ops.onnx.kv_cache import APPEND, paged_attention
from tests.ops.domain.case import HEAD_DIM, HEADS, KV_HEADS, TOKENS, Case, call, of


def cases() -> Iterator[Case]:
    for number, (batch, length) in enumerate(TOKENS):
        width = -(-(length + 20) // PAGE)
        total, layer = batch * width + 1, 1
        cache = {
            "keys": torch.randn(2, total, KV_HEADS, HEAD_DIM, PAGE),
            "values": torch.randn(2, total, KV_HEADS, PAGE, HEAD_DIM),
            "pages": torch.randperm(total)[: batch * width].int().reshape(batch, width),
            "starts": torch.arange(batch) * 7 % 20,
            "counts": length - torch.arange(batch) % (length + 1),
        }
        fresh = {"key": torch.randn(batch, length, 7), "value": torch.randn(batch, length, 9)}
        inputs = of(APPEND, {**cache, **fresh})
        after = {name: tensor.clone() for name, tensor in inputs.items()}
        lengths = call("kv_append", *after.values(), layer, [1, 2])
        expected = (after["keys"].clone(), after["values"].clone(), lengths)
        yield Case(APPEND, inputs, {"layer": layer, "offsets": [1, 2]}, expected)
        # A page that no sequence has may hold anything.
        free = set(range(total)) - set(cache["pages"].flatten().tolist())
        after["keys"][:, list(free)] = torch.nan
        after["values"][:, list(free)] = torch.nan
        for softcap in (0.0, 1.5):
            operator, window = paged_attention(bool(softcap)), [0, 5, 1][number]
            query = torch.randn(batch, length, 14)
            operands = of(operator, {**after, "query": query, "lengths": lengths})
            attributes = {"layer": layer, "heads": HEADS, "offset": 1, "scale": 0.4}
            y = call("paged_attention", *operands.values(), *attributes.values(), window, softcap)
            attributes |= {"window": window} | ({"softcap": softcap} if softcap else {})
            yield Case(operator, operands, attributes, (y,))
