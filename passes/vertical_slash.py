"""Prefill reads the blocks at which, and at whose distance, the latest queries look."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.passes.select_blocks import BlockSelection
from sparsify.selectors import VerticalSlash as Selector


@dataclass(frozen=True)
class VerticalSlash(BlockSelection):
    """Blocks of keys are chosen by the attention of the last 16 queries of a chunk.

    Before::

        y = paged_attention(q, keys, values, pages, lengths, counts)

    After::

        selected = select_blocks(q, keys, [], pages, lengths, counts, "vertical_slash", density)
        y = paged_attention(q, keys, values, pages, lengths, counts, selected=selected)

    `BlockSelection` has the attributes.

    Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via
    Dynamic Sparse Attention", 2024.
    """

    name = "vertical_slash"
    selector = Selector()
