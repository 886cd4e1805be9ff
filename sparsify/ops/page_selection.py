"""Which pages of a cache a new token reads, and what is kept about pages to choose by."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsify.ops.kv_cache import PAGE
from sparsify.ops.library import declare
from sparsify.selectors import page_selector

BOUND_PARTS = (1, 2, 4)
"""Into how many parts with bounds of their own a page may be cut."""


def _check_bounds(bounds: torch.Tensor) -> None:
    torch._check(
        bounds.dim() == 6 and bounds.shape[3] == 2 and int(bounds.shape[5]) in BOUND_PARTS,
        lambda: (
            f"bounds of pages have shape {tuple(bounds.shape)}; it must be [layers, pages, "
            f"kv_heads, 2, head_dim, parts], with {', '.join(map(str, BOUND_PARTS))} parts"
        ),
    )


def _fake_bounds(
    bounds: torch.Tensor,
    keys: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    layer: int,
) -> torch.Tensor:
    _check_bounds(bounds)
    return torch.empty_like(lengths)


@declare(
    "page_bounds(Tensor(a!) bounds, Tensor keys, Tensor pages, Tensor lengths, Tensor counts, "
    "int layer) -> Tensor",
    _fake_bounds,
)
def page_bounds(
    bounds: torch.Tensor,
    keys: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    layer: int,
) -> torch.Tensor:
    """Keeps the least and the largest of each feature of a page's keys, part by part.

    It writes those of the pages that the newest tokens filled; a page that is not full has none.

    Args:
        bounds: ``[layers, pages, kv_heads, 2, head_dim, parts]``, changed in place. A part has
            ``16 / parts`` tokens that follow each other; there are 1, 2 or 4 of a page.
        keys, pages: as `kv_append` takes them.
        lengths: int64 ``[batch]``, what `kv_append` returned.
        counts: int64 ``[batch]``, how many tokens it appended.

    Returns:
        int64 ``[batch]``, ``lengths``: who reads the bounds takes it, and so runs afterwards.
    """
    for row in range(len(lengths)):
        total = int(lengths[row])
        filled = pages[row, (total - int(counts[row])) // PAGE : total // PAGE].long()
        parts = keys[layer, filled].unflatten(-1, (bounds.shape[-1], -1))
        bounds[layer, filled] = torch.stack(parts.aminmax(dim=-1), dim=-3)
    return lengths.clone()


def _fake_select(
    query: torch.Tensor,
    keys: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    pages: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    layer: int,
    heads: int,
    offset: int,
    selector: str,
    budget: int,
    sinks: int = 1,
    recent: int = 1,
) -> torch.Tensor:
    for name, tensor in page_selector(selector).named(tensors):
        if name == "bounds":
            _check_bounds(tensor)
    torch._check(
        sinks >= 0 and recent >= 1 and budget > sinks + recent,
        lambda: (
            f"select_pages: a budget of {budget} pages with {sinks} sinks and {recent} recent ones "
            "leaves none to choose; the latest page is always read, so recent is at least 1"
        ),
    )
    shape = (query.shape[0], keys.shape[2], query.shape[1], budget)
    return query.new_empty(shape, dtype=torch.int32)


@declare(
    "select_pages(Tensor query, Tensor keys, Tensor[] tensors, Tensor pages, Tensor lengths, "
    "Tensor counts, int layer, int heads, int offset, str selector, int budget, int sinks=1, "
    "int recent=1) -> Tensor",
    _fake_select,
)
def select_pages(
    query: torch.Tensor,
    keys: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    pages: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    layer: int,
    heads: int,
    offset: int,
    selector: str,
    budget: int,
    sinks: int = 1,
    recent: int = 1,
) -> torch.Tensor:
    """The pages that each of the newest tokens reads, for each key head.

    A sequence of at most ``budget`` pages is read whole. Of a longer one the first ``sinks`` and
    the latest ``recent`` pages are read, and of the others those whose score is highest: a page's
    score for a key head is the largest of its query heads' scores. Of equal pages the earlier is
    taken.

    Args:
        query, keys, pages, lengths, counts, layer, heads, offset: as `paged_attention` takes them.
        tensors: what the selector reads besides, in the order of its ``tensors``.
        selector: spec of a `sparsify.selectors.PageSelector`.
        budget: pages that are read at most.

    Returns:
        int32 ``[batch, kv_heads, length, budget]``, numbers of pages in their sequence, ascending,
        and -1 behind the last; none at all for a query that is padding.
    """
    _, _, kv_heads, head_dim, _ = keys.shape
    chosen_by, group = page_selector(selector), heads // kv_heads
    found = torch.full((query.shape[0], kv_heads, query.shape[1], budget), -1, dtype=torch.int32)
    for row in range(query.shape[0]):
        for token in range(int(counts[row])):
            full = (int(lengths[row]) - int(counts[row]) + token) // PAGE
            if full < budget:
                found[row, :, token, : full + 1] = torch.arange(full + 1)
                continue
            used = pages[row, :full].long()
            for head in range(kv_heads):
                start = offset + head * group * head_dim
                scores = chosen_by.scores(
                    query[row, token, start : start + group * head_dim].view(group, head_dim),
                    keys[layer, used, head],
                    **{
                        name: tensor[layer, used, head] if name == "bounds" else tensor[head]
                        for name, tensor in chosen_by.named(tensors)
                    },
                )
                score = scores.amax(0)
                score[:sinks] = torch.inf
                score[full + 1 - recent :] = torch.inf
                best = score.sort(descending=True, stable=True).indices[: budget - 1]
                found[row, head, token, :-1] = best.sort().values
                found[row, head, token, -1] = full
    return found
