"""Prefill reads as many blocks as have most of the weight, head by head."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.passes.select_blocks import BlockSelection
from sparsify.selectors import QueryAware


@dataclass(frozen=True)
class FlexPrefill(BlockSelection):
    """Blocks of keys are chosen head by head, by mean queries and keys or by lines, up to ``mass``.

    Before::

        y = paged_attention(q, keys, values, pages, lengths, counts)

    After::

        selected = select_blocks(q, keys, [], pages, lengths, counts, "query_aware", density, mass)
        y = paged_attention(q, keys, values, pages, lengths, counts, selected=selected)

    Means are trusted in heads in which they estimate the attention of the latest queries well; in
    the others, blocks are those that `VerticalSlash` reads.

    Attributes:
        mass: share of the estimated attention that is enough, above 0 and below 1; a head whose
            attention is spread reads up to ``density``. `BlockSelection` has the others.

    Source: Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient
    Long-Sequence Inference", 2025.
    """

    mass: float = 0.95  # type: ignore[misc]  # of recipes in general it is fixed

    name = "flex_prefill"
    selector = QueryAware()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mass < 1:
            raise ValueError(f"FlexPrefill: mass={self.mass} must be above 0 and below 1")
