"""Writing to a paged cache and attending to it, position by position."""

from dataclasses import dataclass

import torch

from sparsify import ops
from tests.ops.eager.case import TOKENS, Case, in_form

KV_HEADS, HEAD_DIM, LAYERS, LAYER = 2, 3, 2, 1


def cases(lanes: bool) -> list[Case]:
    return [*append(lanes), *paged(lanes)]


@dataclass(frozen=True)
class Cache:
    """A paged cache with pages in any order, and what each row of it holds."""

    keys: torch.Tensor
    values: torch.Tensor
    pages: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def random(cls, batch: int, length: int) -> "Cache":
        width = -(-(length + 20) // ops.PAGE)
        number = batch * width + 1
        pages = torch.randperm(number)[: batch * width].to(torch.int32).reshape(batch, width)
        keys = torch.randn(LAYERS, number, KV_HEADS, HEAD_DIM, ops.PAGE)
        values = torch.randn(LAYERS, number, KV_HEADS, ops.PAGE, HEAD_DIM)
        starts = torch.arange(batch) * 7 % 20
        counts = length - torch.arange(batch) % (length + 1)
        return cls(keys, values, pages, starts, counts)

    def at(self, row: int, position: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of one token: views of the cache."""
        page, slot = int(self.pages[row, position // ops.PAGE]), position % ops.PAGE
        return self.keys[LAYER, page, head, :, slot], self.values[LAYER, page, head, slot]


def append(lanes: bool) -> list[Case]:
    found = []
    for batch, length in TOKENS:
        cache = Cache.random(batch, length)
        key, value = torch.randn(batch, length, 7), torch.randn(batch, length, 9)
        offsets = [1, 2]
        after = Cache(cache.keys.clone(), cache.values.clone(), *tuple_of(cache)[2:])
        for row in range(batch):
            for token in range(int(cache.counts[row])):
                for head in range(KV_HEADS):
                    k, v = after.at(row, int(cache.starts[row]) + token, head)
                    k.copy_(key[row, token, 1 + head * HEAD_DIM :][:HEAD_DIM])
                    v.copy_(value[row, token, 2 + head * HEAD_DIM :][:HEAD_DIM])
        if lanes:
            key, value = ops.to_lanes.reference(key), ops.to_lanes.reference(value)
        args = (
            *(cache.keys, cache.values, key, value, cache.pages, cache.starts, cache.counts),
            *(LAYER, offsets, [batch, length] if lanes else []),
        )
        found.append(
            Case(
                "kv_append",
                args,
                cache.starts + cache.counts,
                label=f"{batch}x{length}",
                written={0: after.keys, 1: after.values},
            )
        )
    return found


def tuple_of(cache: Cache) -> tuple[torch.Tensor, ...]:
    return (cache.keys, cache.values, cache.pages, cache.starts, cache.counts)


def paged(lanes: bool) -> list[Case]:
    found = []
    for number, (batch, length) in enumerate(TOKENS):
        cache = Cache.random(batch, length)
        window, softcap = [0, 5, 1, 0, 3][number], [0.0, 0.0, 2.0, 1.5, 0.0][number]
        query, heads, offset, scale = torch.randn(batch, length, 14), 4, 1, 0.4
        y = torch.zeros(batch, length, heads, HEAD_DIM)
        for row in range(batch):
            for token in range(int(cache.counts[row])):
                for head in range(heads):
                    q = query[row, token, offset + head * HEAD_DIM :][:HEAD_DIM]
                    y[row, token, head] = attend(
                        cache, row, token, head // 2, q, scale, window, softcap
                    )
        if lanes:
            query = ops.to_lanes.reference(query)
        args = (
            *(query, cache.keys, cache.values, cache.pages, cache.starts + cache.counts),
            *(cache.counts, LAYER, heads, offset, scale, window, softcap),
            [batch, length] if lanes else [],
        )
        label = f"{batch}x{length}-{window}-{softcap}"
        found.append(Case("paged_attention", args, in_form(y.flatten(2), lanes), label=label))
    return found


def attend(cache, row, token, head, query, scale, window, softcap):
    """One query over the cache, position by position, in float64."""
    here = int(cache.starts[row]) + token
    first = max(0, here - window + 1) if window else 0
    seen = [cache.at(row, position, head) for position in range(first, here + 1)]
    scores = torch.stack([query.double() @ k.double() for k, _ in seen]) * scale
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    return (scores.softmax(0)[:, None] * torch.stack([v.double() for _, v in seen])).sum(0)
