"""Pages by their keys' products with the query: every key is read, no value.

Source: Yang et al., "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse
Attention", 2024, whose few selecting layers choose for the layers behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.selectors.base import PageSelector, register_page_selector


@register_page_selector
@dataclass(frozen=True)
class Exact(PageSelector):
    """The largest product of a key of the page."""

    name = "exact"
    scoring = "products"

    def scores(
        self, query: torch.Tensor, keys: torch.Tensor, **tensors: torch.Tensor
    ) -> torch.Tensor:
        return torch.einsum("gd,pds->gps", query, keys).amax(-1)
