"""Pages by their keys' products with the query in a few features, those that matter most.

Source: Yang et al., "Post-Training Sparse Attention with Double Sparsity", 2024. There, labels of
the chosen channels are kept beside the cache and single tokens are chosen; here a page's features
are runs of memory already, so no labels are needed, and whole pages are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.selectors.base import PageSelector, register_page_selector


@register_page_selector
@dataclass(frozen=True)
class Channels(PageSelector):
    """The largest product of a key of the page, over the chosen features alone."""

    name = "channels"
    scoring = "products"
    tensors = ("channels",)

    def scores(
        self, query: torch.Tensor, keys: torch.Tensor, **tensors: torch.Tensor
    ) -> torch.Tensor:
        chosen = tensors["channels"].long()
        return torch.einsum("gd,pds->gps", query[:, chosen], keys[:, chosen]).amax(-1)
