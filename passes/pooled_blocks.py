"""Prefill reads the blocks whose mean keys have the largest products with mean queries."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.passes.select_blocks import BlockSelection
from sparsify.selectors import Pooled


@dataclass(frozen=True)
class PooledBlocks(BlockSelection):
    """Blocks of keys are chosen by mean queries and mean keys, a fixed share of them.

    Before::

        y = paged_attention(q, keys, values, pages, lengths, counts)

    After::

        selected = select_blocks(q, keys, [], pages, lengths, counts, "pooled", density)
        y = paged_attention(q, keys, values, pages, lengths, counts, selected=selected)

    `BlockSelection` has the attributes.

    Source: Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient
    Long-Sequence Inference", 2025, whose query-aware pattern this is with a fixed budget.
    """

    name = "pooled_blocks"
    selector = Pooled()
