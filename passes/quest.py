"""Decode reads the pages whose bounds promise most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from sparsify import ops
from sparsify.ops import BOUND_PARTS, PAGE
from sparsify.passes.select_pages import PageSelection, keep_bounds
from sparsify.rewriter import Rewriter
from sparsify.selectors import PageBounds

_KEYS = tuple(PAGE // parts for parts in BOUND_PARTS)


@dataclass(frozen=True)
class Quest(PageSelection):
    """A step reads the pages in which a key could have the largest product with its query.

    Before::

        lengths = kv_append(keys, values, ...)
        y = paged_attention(q, keys, values, pages, lengths, counts)

    After::

        lengths = page_bounds(bounds, keys, pages, kv_append(keys, values, ...), counts)
        selected = select_pages(q, keys, [bounds], pages, lengths, counts, "page_bounds", budget)
        y = paged_attention(q, keys, values, pages, lengths, counts, selected=selected)

    The least and the largest of each feature of a page's keys are state of the cache, which prefill
    keeps as well.

    Attributes:
        bound_keys: how many keys share their least and largest features: 16, those of a page as in
            the paper, or 8 or 4 of it. What is read stays whole pages. The fewer share, the truer
            is the promise, and the more there is to keep and to look through: for 16 a sixteenth of
            what the cache takes, for 4 a quarter. `PageSelection` has the others.

    Raises:
        ValueError: naming the attribute.

    Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    2024.
    """

    bound_keys: int = 4

    name = "quest"
    selector = PageBounds()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bound_keys not in _KEYS:
            raise ValueError(
                f"Quest: bound_keys={self.bound_keys} must be one of {', '.join(map(str, _KEYS))}: "
                "those of a page, or of a part of one"
            )

    @property
    def _chosen_by(self) -> str:
        return f"{self.selector.spec} of {self.bound_keys} keys"

    def tensors(self, rewriter: Rewriter, node: fx.Node) -> Sequence[fx.Node]:
        return (keep_bounds(rewriter, node, PAGE // self.bound_keys),)

    def tensors_of(
        self, keys: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, layer: int
    ) -> list[torch.Tensor]:
        _, count, kv_heads, head_dim, _ = keys.shape
        bounds = torch.zeros(1, count, kv_heads, 2, head_dim, PAGE // self.bound_keys)
        ops.page_bounds.reference(bounds, keys, pages, lengths, lengths, 0)
        return [bounds]
