"""What selectors are, and the registry that finds one by its name.

A page selector scores the pages of a cache for one query, a block selector weighs blocks of keys
for a block of queries; the best of them are read. What is read anyway, how much is read, and how
the query heads of one key head agree is the same for all, and not its business: see
`sparsify.ops.select_pages` and `sparsify.ops.select_blocks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch

Scoring = Literal["bounds", "products", "order"]
"""How the kernel family scores a page:

bounds: by the least and the largest of each feature of its keys.
products: by the largest product of the query with one of its keys, over all features or over those
    that are listed for each key head.
order: by its place in the sequence, without looking at it.
"""


@dataclass(frozen=True)
class PageSelector(ABC):
    """A method of scoring pages.

    ``scores`` is all the method. ``scoring`` names the member of the kernel family that computes
    the same; a selector without one runs as it stands here, on PyTorch.
    """

    name: ClassVar[str]
    scoring: ClassVar[Scoring | None] = None
    tensors: ClassVar[tuple[str, ...]] = ()
    """What it reads besides the query and the keys, in the operator's order: ``bounds``, the
    state that `sparsify.ops.page_bounds` keeps, and ``channels``, int32 ``[kv_heads, chosen]``."""

    @abstractmethod
    def scores(
        self, query: torch.Tensor, keys: torch.Tensor, **tensors: torch.Tensor
    ) -> torch.Tensor:
        """float ``[group, pages]``, higher for pages that matter more to a query head.

        Args:
            query: ``[group, head_dim]``, the query heads of one key head.
            keys: ``[pages, head_dim, 16]``, the pages of that head in the sequence's order, all of
                them full.
            tensors: by name, those of this head: ``bounds [pages, 2, head_dim]``,
                ``channels [chosen]``.
        """


BlockScoring = Literal["pooled", "lines"]
"""How the kernel family weighs a block of keys for a block of queries:

pooled: by the product of the mean query, through a matrix of its head where there is one, with the
    mean key.
lines: by what the latest queries give to it, and to the block at the same distance from them.
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
class BlockSelector(ABC):
    """A method of weighing blocks of keys for blocks of queries.

    ``weights`` is all the method; ``scoring`` is as in `PageSelector`.
    """

    name: ClassVar[str]
    scoring: ClassVar[BlockScoring | None] = None
    tensors: ClassVar[tuple[str, ...]] = ()
    """``gates``, float32 ``[heads, head_dim, head_dim]``, where it reads them."""

    @abstractmethod
    def weights(self, view: BlockView, **tensors: torch.Tensor) -> torch.Tensor:
        """float ``[view.blocks]``, not negative: shares of attention, as far as they are known.

        Args:
            tensors: by name, those of this head.
        """


_REGISTRY: dict[str, type[PageSelector] | type[BlockSelector]] = {}

_Selector = TypeVar("_Selector", type[PageSelector], type[BlockSelector])


def register(selector: _Selector) -> _Selector:
    """Class decorator: makes a selector known by its name."""
    known = _REGISTRY.setdefault(selector.name, selector)
    if known is not selector:
        raise ValueError(f"selector name {selector.name!r} is taken by {known.__module__}")
    return selector


def selector_names(kind: type[PageSelector] | type[BlockSelector]) -> tuple[str, ...]:
    """The names of all page selectors, or of all block selectors."""
    return tuple(sorted(name for name, of in _REGISTRY.items() if issubclass(of, kind)))


def page_selector(name: str) -> PageSelector:
    """The page selector of that name.

    Raises:
        ValueError: there is none.
    """
    found = _REGISTRY.get(name)
    if found is None or not issubclass(found, PageSelector):
        known = ", ".join(selector_names(PageSelector))
        raise ValueError(f"unknown page selector {name!r}; known are {known}")
    return found()


def block_selector(name: str) -> BlockSelector:
    """The block selector of that name.

    Raises:
        ValueError: there is none.
    """
    found = _REGISTRY.get(name)
    if found is None or not issubclass(found, BlockSelector):
        known = ", ".join(selector_names(BlockSelector))
        raise ValueError(f"unknown block selector {name!r}; known are {known}")
    return found()
