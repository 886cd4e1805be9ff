"""Which blocks of a cache's keys a block of new tokens reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsify.layouts import LANES
from sparsify.ops.kv_cache import PAGE
from sparsify.ops.lanes import from_lanes
from sparsify.ops.library import declare
from sparsify.selectors import BlockView, block_selector

DENSITY_STEPS = 1 << 16
"""Densities are rounded to so many steps, for all who compute numbers of blocks from them."""


def _fake(
    query: torch.Tensor,
    keys: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    pages: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    layer: int,
    heads: int,
    offset: int,
    scale: float,
    selector: str,
    block: Sequence[int],
    density: float,
    mass: float = 0.0,
    sinks: int = 1,
    recent: int = 1,
    extents: Sequence[int] = (),
) -> torch.Tensor:
    block_selector(selector).named(tensors)
    torch._check(
        0 < density <= 1 and 0 <= mass < 1 and sinks >= 0 and recent >= 1,
        lambda: (
            f"select_blocks: density={density} must be above 0 and at most 1, mass={mass} below "
            f"1, sinks={sinks} at least 0, recent={recent} at least 1"
        ),
    )
    batch, length = extents or query.shape[:2]
    rows, columns = -(-length // block[0]), -(-pages.shape[1] // block[1])
    return query.new_empty((batch, heads, rows, columns), dtype=torch.int32)


@declare(
    "select_blocks(Tensor query, Tensor keys, Tensor[] tensors, Tensor pages, Tensor lengths, "
    "Tensor counts, int layer, int heads, int offset, float scale, str selector, int[] block, "
    "float density, float mass=0.0, int sinks=1, int recent=1, SymInt[] extents=[]) -> Tensor",
    _fake,
)
def select_blocks(
    query: torch.Tensor,
    keys: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    pages: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    layer: int,
    heads: int,
    offset: int,
    scale: float,
    selector: str,
    block: Sequence[int],
    density: float,
    mass: float = 0.0,
    sinks: int = 1,
    recent: int = 1,
    extents: Sequence[int] = (),
) -> torch.Tensor:
    """The blocks of keys that each block of the newest tokens reads, for each query head.

    Of the blocks that a block of queries may see, the first ``sinks`` are read, those in which its
    own tokens lie and the ``recent - 1`` before them; of the others those of most weight, until
    ``density`` of all that it may see are read (to the nearest block), or until what is read has
    ``mass`` of the whole weight, if that is sooner. Of equal blocks the earlier is taken.

    Args:
        query, keys, pages, lengths, counts, layer, heads, offset, scale: as `paged_attention`
            takes them.
        tensors: what the selector reads besides, in the order of its ``tensors``.
        selector: spec of a `sparsify.selectors.BlockSelector`.
        block: queries, and pages, of a block.
        mass: 0: the density alone decides.
        extents: empty for row-major tensors; ``[batch, length]`` when the query is in lanes.

    Returns:
        int32 ``[batch, heads, query_blocks, key_blocks]``, as `paged_attention` takes it.
    """
    _, _, kv_heads, head_dim, _ = keys.shape
    if extents:
        query = from_lanes.reference(query, tuple(extents))
    batch, length, _ = query.shape
    chosen_by, size = block_selector(selector), block[1] * PAGE
    rows, columns = -(-length // block[0]), -(-pages.shape[1] // block[1])
    found = torch.full((batch, heads, rows, columns), -1, dtype=torch.int32)
    steps = round(density * DENSITY_STEPS)
    for sequence in range(batch):
        total, count = int(lengths[sequence]), int(counts[sequence])
        used = pages[sequence, : -(-total // PAGE)].long()
        for head in range(heads):
            own = keys[layer, used, head * kv_heads // heads].transpose(1, 2).flatten(0, 1)[:total]
            start = offset + head * head_dim
            q = query[sequence, :count, start : start + head_dim]
            of_head = {name: tensor[head] for name, tensor in chosen_by.named(tensors)}
            for row, part in enumerate(q.split(block[0]) if count else ()):
                first = total - count + row * block[0]
                view = BlockView(part, first, own, q[-LANES:], size, scale)
                weights, blocks = chosen_by.weights(view, **of_head), view.blocks
                near = max(first // size - recent + 1, 0)
                forced = min(sinks + blocks - near, blocks)
                places = min(
                    max((blocks * steps + DENSITY_STEPS // 2) // DENSITY_STEPS, forced), blocks
                )
                rank = weights.clone()
                rank[:sinks] = torch.inf
                rank[near:] = torch.inf
                order = rank.sort(descending=True, stable=True).indices
                if mass:
                    share = weights[order].cumsum(0)
                    enough = int((share < mass * weights.sum()).sum()) + 1
                    places = min(max(enough, forced), places)
                found[sequence, head, row, :places] = order[:places].sort().values
    return found
