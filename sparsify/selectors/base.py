"""What a page selector is, and the registry that finds one by its name.

A selector scores the pages of a cache for a query; the best of them are read. Which pages are read
anyway, how many are read, and how the query heads of one key head agree is the same for all, and
not its business: see `sparsify.ops.select_pages`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

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


_REGISTRY: dict[str, type[PageSelector]] = {}


def register(selector: type[PageSelector]) -> type[PageSelector]:
    """Class decorator: makes a selector known by its name."""
    known = _REGISTRY.setdefault(selector.name, selector)
    if known is not selector:
        raise ValueError(f"selector name {selector.name!r} is taken by {known.__module__}")
    return selector


def selector_names() -> tuple[str, ...]:
    return tuple(sorted(_REGISTRY))


def parse(name: str) -> PageSelector:
    """The selector of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown selector {name!r}; known are {', '.join(selector_names())}")
    return _REGISTRY[name]()
