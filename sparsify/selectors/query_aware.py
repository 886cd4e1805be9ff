"""Blocks by mean queries and mean keys in heads where means tell the truth, by lines elsewhere.

Source: Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient
Long-Sequence Inference", 2025. There, the last block of queries tells which; here the last 16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sparsify.selectors.base import BlockSelector, BlockView, register_block_selector
from sparsify.selectors.pooled import Pooled
from sparsify.selectors.vertical_slash import VerticalSlash, latest_attention

MOST_DIVERGENCE = 0.1
"""Square root of the Jensen-Shannon divergence, in nats, up to which means are trusted: the paper's
for all models."""


@register_block_selector
@dataclass(frozen=True)
class QueryAware(BlockSelector):
    """`Pooled` where it estimates the latest queries' attention well, else `VerticalSlash`."""

    name = "query_aware"
    scoring = "query_aware"

    def weights(self, view: BlockView, **tensors: torch.Tensor) -> torch.Tensor:
        first = len(view.keys) - len(view.latest)
        estimate = Pooled().weights(replace(view, query=view.latest, first=first))
        divergence = _divergence(estimate, latest_attention(view) / len(view.latest))
        chosen = Pooled() if divergence < MOST_DIVERGENCE**2 else VerticalSlash()
        return chosen.weights(view)


def _divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    """Jensen-Shannon divergence of two distributions, in nats."""
    return float((_information(a) + _information(b)) / 2 - _information((a + b) / 2))


def _information(shares: torch.Tensor) -> torch.Tensor:
    return torch.xlogy(shares, shares).sum()
