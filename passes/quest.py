"""Decode reads the pages whose bounds promise most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from sparsify import ops
from sparsify.passes.select_pages import PageSelection, keep_bounds
from sparsify.rewriter import Rewriter
from sparsify.selectors import PageBounds


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
    keeps as well. `PageSelection` has the attributes.

    Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    2024.
    """

    name = "quest"
    selector = PageBounds()

    def tensors(self, rewriter: Rewriter, node: fx.Node) -> Sequence[fx.Node]:
        return (keep_bounds(rewriter, node),)

    def tensors_of(
        self, keys: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, layer: int
    ) -> list[torch.Tensor]:
        _, count, kv_heads, head_dim, _ = keys.shape
        bounds = torch.zeros(1, count, kv_heads, 2, head_dim)
        ops.page_bounds.reference(bounds, keys, pages, lengths, lengths, 0)
        return [bounds]
