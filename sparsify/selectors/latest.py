"""The latest pages, whatever they hold.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023, where the
first tokens are kept beside a window of the latest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.selectors.base import PageSelector, register_page_selector


@register_page_selector
@dataclass(frozen=True)
class Latest(PageSelector):
    """A page's place in the sequence."""

    name = "latest"
    scoring = "order"

    def scores(
        self, query: torch.Tensor, keys: torch.Tensor, **tensors: torch.Tensor
    ) -> torch.Tensor:
        return torch.arange(len(keys), dtype=query.dtype).expand(len(query), -1)
