"""Pages by the largest product that a key within their bounds could have.

Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.selectors.base import PageSelector, register_page_selector


@register_page_selector
@dataclass(frozen=True)
class PageBounds(PageSelector):
    """The sum over features of the larger product with the least or the largest key.

    Where a page's parts have bounds of their own, that of the part with the largest.
    """

    name = "page_bounds"
    scoring = "bounds"
    tensors = ("bounds",)

    def scores(
        self, query: torch.Tensor, keys: torch.Tensor, **tensors: torch.Tensor
    ) -> torch.Tensor:
        products = query[:, None, None, :, None] * tensors["bounds"]
        return products.amax(2).sum(-2).amax(-1)
