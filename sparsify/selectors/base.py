"""What selectors are, and the registries that find one by its spec.

A page selector scores the pages of a cache for one query, a block selector weighs blocks of keys
for a block of queries; the best of them are read. What is read anyway, how much is read, and how
the query heads of one key head agree is the same for all, and not its business: see
`sparsify.ops.select_pages` and `sparsify.ops.select_blocks`.

A selector is a frozen dataclass whose fields are integers; its spec is text, ``page_bounds``, which
operators carry. What depends on a model's weights or on its cache is in tensors beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from sparsify.specs import Registry, spec_of


@dataclass(frozen=True)
class Selector(ABC):
    """What page selectors and block selectors have in common."""

    name: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]] = ()
    """What it reads besides the query and the keys, by name, in the operator's order."""

    def named(self, tensors: Sequence[torch.Tensor]) -> Iterable[tuple[str, torch.Tensor]]:
        """An operator's tensors, each with its name.

        Raises:
            ValueError: there are more or fewer than it reads.
        """
        if len(tensors) != len(self.tensors):
            names = ", ".join(self.tensors) or "no tensors"
            raise ValueError(
                f"selector {self.spec}: takes {names} besides the query and the keys; "
                f"{len(tensors)} were given"
            )
        return zip(self.tensors, tensors, strict=True)

    @property
    def spec(self) -> str:
        return spec_of(self)

    def __str__(self) -> str:
        return self.spec


Scoring = Literal["bounds", "products", "order"]
"""How the kernel family scores a page:

bounds: by the least and the largest of each feature of its keys, or of each part of them.
products: by the largest product of the query with one of its keys, over all features or over those
    that are listed for each key head.
order: by its place in the sequence, without looking at it.
"""


@dataclass(frozen=True)
class PageSelector(Selector):
    """A method of scoring pages.

    ``scores`` is all the method. ``scoring`` names the member of the kernel family that computes
    the same; a selector without one runs as it stands here, on PyTorch. ``tensors`` may name
    ``bounds``, the state that `sparsify.ops.page_bounds` keeps, and whatever has a row for each key
    head, like ``channels``, int32 ``[kv_heads, chosen]``.
    """

    scoring: ClassVar[Scoring | None] = None

    @abstractmethod
    def scores(
        self, query: torch.Tensor, keys: torch.Tensor, **tensors: torch.Tensor
    ) -> torch.Tensor:
        """float ``[group, pages]``, higher for pages that matter more to a query head.

        Args:
            query: ``[group, head_dim]``, the query heads of one key head.
            keys: ``[pages, head_dim, 16]``, the pages of that head in the sequence's order, all of
                them full.
            tensors: by name, those of this head: ``bounds [pages, 2, head_dim, parts]``,
                ``channels [chosen]``.
        """


BlockScoring = Literal["pooled", "lines", "nearness", "query_aware", "head_patterns"]
"""How the kernel family weighs a block of keys for a block of queries:

pooled: by the product of the mean query, through a matrix of its head where there are ``gates``,
    with the mean key.
lines: by what the latest queries give to it, and to the block at the same distance from them.
nearness: by its distance alone.
query_aware: pooled, in heads where that comes close to what the latest queries give, else lines.
head_patterns: nearness, lines or pooled, as ``patterns`` say for each head.
"""


@dataclass(frozen=True)
class BlockView:
    """What one query head of a sequence has to choose blocks of keys by.

    Attributes:
        query: ``[queries, head_dim]``, the block of queries; the first stands at ``first``.
        keys: ``[keys, head_dim]``, of the whole sequence.
        latest: ``[at most 16, head_dim]``, the last queries of the sequence.
        block: keys of a block.
        scale: of the scores.
    """

    query: torch.Tensor
    first: int
    keys: torch.Tensor
    latest: torch.Tensor
    block: int
    scale: float

    @property
    def blocks(self) -> int:
        """Blocks that the queries may see."""
        return (self.first + len(self.query) - 1) // self.block + 1


@dataclass(frozen=True)
class BlockSelector(Selector):
    """A method of weighing blocks of keys for blocks of queries.

    ``weights`` is all the method; ``scoring`` is as in `PageSelector`. ``tensors`` have a row for
    each query head: ``gates``, float32 ``[heads, head_dim, head_dim]``, ``patterns``, int32
    ``[heads]``, or what only a selector without a scoring knows.
    """

    scoring: ClassVar[BlockScoring | None] = None

    @abstractmethod
    def weights(self, view: BlockView, **tensors: torch.Tensor) -> torch.Tensor:
        """float ``[view.blocks]``, not negative: shares of attention, as far as they are known.

        Args:
            tensors: by name, those of this head.
        """


PAGE_SELECTORS: Registry[PageSelector] = Registry("page selector")
"""Every page selector by its name."""

BLOCK_SELECTORS: Registry[BlockSelector] = Registry("block selector")
"""Every block selector by its name."""

register_page_selector = PAGE_SELECTORS.register
page_selector = PAGE_SELECTORS.parse
register_block_selector = BLOCK_SELECTORS.register
block_selector = BLOCK_SELECTORS.parse
