"""Bounds and selections of pages, and attention over a selection, page by page."""

import torch

from sparsify import ops
from tests.ops.eager.case import TOKENS, Case, in_form
from tests.ops.eager.kv_cache import HEAD_DIM, KV_HEADS, LAYER, LAYERS, Cache

HEADS, OFFSET, CHANNELS = 4, 1, 2
SELECTORS = ("page_bounds", "channels", "exact", "latest")
PARTS = (1, 4, 2)
"""Of a page, with bounds of their own."""


def cases(lanes: bool) -> list[Case]:
    return [*selected(lanes), *([] if lanes else [*bounds(), *selections()])]


def long_cache(batch: int, length: int) -> Cache:
    """Rows of six pages and more, of all lengths."""
    width = -(-(length + 110) // ops.PAGE)
    number = batch * width + 1
    pages = torch.randperm(number)[: batch * width].to(torch.int32).reshape(batch, width)
    keys = torch.randn(LAYERS, number, KV_HEADS, HEAD_DIM, ops.PAGE)
    values = torch.randn(LAYERS, number, KV_HEADS, ops.PAGE, HEAD_DIM)
    starts = torch.arange(batch) * 23 % 110
    return Cache(keys, values, pages, starts, length - torch.arange(batch) % (length + 1))


def bounds() -> list[Case]:
    found = []
    for number, (batch, length) in enumerate(TOKENS):
        cache, parts = long_cache(batch, length), PARTS[number % len(PARTS)]
        before = torch.randn(LAYERS, cache.keys.shape[1], KV_HEADS, 2, HEAD_DIM, parts)
        after = before.clone()
        for row in range(batch):
            for token in range(int(cache.counts[row])):
                last = int(cache.starts[row]) + token
                if last % ops.PAGE == ops.PAGE - 1:
                    page = int(cache.pages[row, last // ops.PAGE])
                    for part, keys in enumerate(cache.keys[LAYER, page].chunk(parts, -1)):
                        after[LAYER, page, :, 0, :, part] = keys.min(-1).values
                        after[LAYER, page, :, 1, :, part] = keys.max(-1).values
        lengths = cache.starts + cache.counts
        args = (before, cache.keys, cache.pages, lengths, cache.counts, LAYER)
        written = {0: after}
        found.append(Case("page_bounds", args, lengths, label=f"{batch}x{length}", written=written))
    return found


def bounds_of(keys, parts):
    """Of every page of all layers."""
    least, largest = zip(*(part.aminmax(dim=-1) for part in keys.chunk(parts, -1)), strict=True)
    return torch.stack((torch.stack(least, -1), torch.stack(largest, -1)), 3)


def selections() -> list[Case]:
    found = []
    sizes = [*TOKENS, *TOKENS[:3]]
    chosen_by = [SELECTORS[number % len(SELECTORS)] for number in range(len(sizes))]
    # A long cache for each number of parts.
    sizes += [TOKENS[-1]] * len(PARTS)
    chosen_by += ["page_bounds"] * len(PARTS)
    for number, ((batch, length), selector) in enumerate(zip(sizes, chosen_by, strict=True)):
        cache = long_cache(batch, length)
        budget, sinks, recent = 5, number % 2, 1 + number % 3
        parts = PARTS[number % len(PARTS)]
        query = torch.randn(batch, length, 14)
        tensors = {
            "page_bounds": [bounds_of(cache.keys, parts)],
            "channels": [torch.tensor([[0, 2], [2, 1]], dtype=torch.int32)],
        }.get(selector, [])
        lists = torch.full((batch, KV_HEADS, length, budget), -1, dtype=torch.int32)
        for row in range(batch):
            for token in range(int(cache.counts[row])):
                newest = (int(cache.starts[row]) + token) // ops.PAGE
                for head in range(KV_HEADS):
                    q = query[row, token, OFFSET + head * 2 * HEAD_DIM :][: 2 * HEAD_DIM]
                    scores = [
                        [
                            score(cache, row, page, head, h, selector, tensors)
                            for page in range(newest)
                        ]
                        for h in q.reshape(2, HEAD_DIM)
                    ]
                    read = chosen(scores, newest, budget, sinks, recent)
                    lists[row, head, token, : len(read)] = torch.tensor(read)
        lengths = cache.starts + cache.counts
        args = (
            *(query, cache.keys, tensors, cache.pages, lengths, cache.counts),
            *(LAYER, HEADS, OFFSET, selector, budget, sinks, recent),
        )
        found.append(Case("select_pages", args, lists, label=f"{selector}-{batch}x{length}"))
    return found


def score(cache, row, page, head, query, selector, tensors):
    """Of one page for one query head."""
    keys = cache.keys[LAYER, int(cache.pages[row, page]), head]
    if selector == "latest":
        return float(page)
    if selector == "page_bounds":
        of_parts = keys.chunk(tensors[0].shape[-1], -1)
        return max(
            float(sum(max(q * k.min(), q * k.max()) for q, k in zip(query, part, strict=True)))
            for part in of_parts
        )
    chosen = tensors[0][head].tolist() if selector == "channels" else range(HEAD_DIM)
    return max(float(sum(query[d] * keys[d, s] for d in chosen)) for s in range(ops.PAGE))


def chosen(scores, newest, budget, sinks, recent):
    """The pages that are read, by their definition."""
    if newest < budget:
        return list(range(newest + 1))
    always = {*range(sinks), *range(newest + 1 - recent, newest + 1)}
    ranks = [max(of[page] for of in scores) for page in range(newest)]
    others = sorted(set(range(newest)) - always, key=lambda page: -ranks[page])
    return sorted([*always, *others[: budget - len(always)]])


def selected(lanes: bool) -> list[Case]:
    found = []
    for number, (batch, length) in enumerate(TOKENS):
        cache, block = long_cache(batch, length), [(1, 1), (2, 1), (4, 2), (16, 4), (3, 3)][number]
        lengths, softcap = cache.starts + cache.counts, [0.0, 2.0][number % 2]
        query, scale = torch.randn(batch, length, 14), 0.4
        columns = -(-int(lengths.max()) // (block[1] * ops.PAGE))
        shape = (batch, [2, 4][number % 2], -(-length // block[0]), columns)
        seen = torch.rand(shape) < 0.5
        seen &= (torch.arange(columns) * (block[1] * ops.PAGE) < lengths[:, None])[:, None, None]
        seen[..., 0] = True  # that every query sees something
        order = torch.where(seen, torch.arange(columns), columns).sort().values
        lists = torch.where(order == columns, -1, order).int()
        y = torch.zeros(batch, length, HEADS, HEAD_DIM)
        for row in range(batch):
            for token in range(int(cache.counts[row])):
                for head in range(HEADS):
                    here = int(cache.starts[row]) + token
                    of_head = seen[row, head * shape[1] // HEADS, token // block[0]]
                    held = [
                        cache.at(row, position, head // 2)
                        for position in range(here + 1)
                        if of_head[position // (block[1] * ops.PAGE)]
                    ]
                    q = query[row, token, OFFSET + head * HEAD_DIM :][:HEAD_DIM].double()
                    scores = torch.stack([q @ k.double() for k, _ in held]) * scale
                    if softcap:
                        scores = (scores / softcap).tanh() * softcap
                    values = torch.stack([v.double() for _, v in held])
                    y[row, token, head] = (scores.softmax(0)[:, None] * values).sum(0)
        args = (
            ops.to_lanes.reference(query) if lanes else query,
            *(cache.keys, cache.values, cache.pages, lengths, cache.counts),
            *(LAYER, HEADS, OFFSET, scale, 0, softcap),
            [batch, length] if lanes else [],
            *(lists, list(block)),
        )
        label = f"selected-{batch}x{length}"
        found.append(Case("paged_attention", args, in_form(y.flatten(2), lanes), label=label))
    return found
