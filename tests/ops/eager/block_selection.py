"""Selections of blocks of keys for blocks of queries, block by block."""

import math

import torch

from sparsify import ops
from tests.ops.eager.case import TOKENS, Case
from tests.ops.eager.kv_cache import HEAD_DIM, LAYER
from tests.ops.eager.page_selection import HEADS, OFFSET, long_cache

SELECTORS = ("pooled", "block_gate", "vertical_slash", "query_aware", "a_shape", "head_patterns")
PATTERNS = ("a_shape", "vertical_slash", "pooled")
SCALE = 0.7


def cases(lanes: bool) -> list[Case]:
    found = []
    for number, (batch, length) in enumerate(
        [*TOKENS, (2, 37), (1, 50), (1, 50), (2, 37), (2, 41), (1, 61), (2, 33)]
    ):
        cache, selector = long_cache(batch, length), SELECTORS[number % len(SELECTORS)]
        block, density = [(16, 1), (7, 2), (32, 1)][number % 3], [0.4, 0.25, 0.7][number % 3]
        mass, sinks, recent = [0.0, 0.6][number % 2], number % 3, 1 + number % 2
        query = torch.randn(batch, length, 14)
        given = {
            "block_gate": [torch.randn(HEADS, HEAD_DIM, HEAD_DIM)],
            "head_patterns": [(torch.arange(HEADS) + number).int() % len(PATTERNS)],
        }
        tensors = given.get(selector, [])
        columns, rows = -(-cache.pages.shape[1] // block[1]), -(-length // block[0])
        lists = torch.full((batch, HEADS, rows, columns), -1, dtype=torch.int32)
        for row in range(batch):
            start, count = int(cache.starts[row]), int(cache.counts[row])
            for head in range(HEADS):
                keys = torch.stack(
                    [cache.at(row, place, head // 2)[0] for place in range(start + count)]
                    or [torch.zeros(HEAD_DIM)]
                ).double()
                q = query[row, :count, OFFSET + head * HEAD_DIM :][:, :HEAD_DIM].double()
                gate = torch.eye(HEAD_DIM).double()
                if selector == "block_gate":
                    gate = tensors[0][head].double()
                size = block[1] * ops.PAGE
                own_pattern = selector
                if selector == "head_patterns":
                    own_pattern = PATTERNS[tensors[0][head]]
                by_lines = own_pattern == "vertical_slash"
                if selector == "query_aware" and count:
                    by_lines = diverges(q, keys, size)
                for part in range(-(-count // block[0])):
                    own = q[part * block[0] : (part + 1) * block[0]]
                    first = start + part * block[0]
                    if own_pattern == "a_shape":
                        last = (first + len(own) - 1) // size
                        weights = [1 / (1 + last - j) for j in range(last + 1)]
                    elif by_lines:
                        weights = lines(q, keys, first + len(own) - 1, size)
                    else:
                        weights = pooled(own @ gate, keys, first, size)
                    near = first // size
                    listed = chosen(weights, near, density, mass, sinks, recent)
                    lists[row, head, part, : len(listed)] = torch.tensor(listed)
        args = (
            *(ops.to_lanes.reference(query) if lanes else query, cache.keys, tensors, cache.pages),
            *(cache.starts + cache.counts, cache.counts, LAYER, HEADS, OFFSET, SCALE, selector),
            *(list(block), density, mass, sinks, recent, [batch, length] if lanes else []),
        )
        found.append(Case("select_blocks", args, lists, label=f"{selector}-{batch}x{length}"))
    return found


def pooled(own, keys, first, size):
    """Shares of blocks by mean queries and mean keys."""
    count = (first + len(own) - 1) // size + 1
    means = [
        sum(keys[j * size : (j + 1) * size]) / len(keys[j * size : (j + 1) * size])
        for j in range(count)
    ]
    scores = torch.stack([(sum(own) / len(own)) @ mean * SCALE for mean in means])
    return (scores.exp() / scores.exp().sum()).tolist()


def diverges(queries, keys, size):
    """Whether means are too far from what the latest queries look at."""
    latest = queries[-16:]
    estimate = pooled(latest, keys, len(keys) - len(latest), size)
    truth = [share / len(latest) for share in looked_at(queries, keys, size)]
    found = 0.0
    for a, b in zip(estimate, truth, strict=True):
        for share in (a, b):
            found += share * math.log(share / ((a + b) / 2)) / 2 if share else 0.0
    return found >= 0.1**2


def looked_at(queries, keys, size):
    """What the latest queries give to each block."""
    given = [0.0] * -(-len(keys) // size)
    for back in range(min(16, len(queries))):
        seen = len(keys) - back
        scores = (keys[:seen] @ queries[len(queries) - 1 - back] * SCALE).exp()
        for place, score in enumerate(scores):
            given[place // size] += float(score / scores.sum())
    return given


def lines(queries, keys, last, size):
    """Shares of blocks by the latest queries, there and at the same distance."""
    given = looked_at(queries, keys, size)
    count = last // size + 1
    return [given[j] + given[j + len(given) - count] for j in range(count)]


def chosen(weights, near, density, mass, sinks, recent):
    """The blocks that are read, by their definition."""
    count = len(weights)
    always = {*range(min(sinks, count)), *range(max(near - recent + 1, 0), count)}
    ranked = sorted(set(range(count)) - always, key=lambda block: -weights[block])
    read, limit = list(always), max(round(count * density), len(always))
    for block in ranked:
        if len(read) >= limit or (mass and sum(weights[b] for b in read) >= mass * sum(weights)):
            break
        read.append(block)
    return sorted(read)
