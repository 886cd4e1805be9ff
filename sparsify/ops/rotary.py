"""Rotary position embedding on unsplit projections.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, in the
half-split form of GPT-NeoX and Llama.
"""

from __future__ import annotations

import torch

from sparsify.ops.library import declare


def _fake(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    head_dim: int,
    lanes: bool = False,
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@declare(
    "rotary(Tensor x, Tensor cos, Tensor sin, int heads, int head_dim, bool lanes=False) -> Tensor",
    _fake,
)
def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    head_dim: int,
    lanes: bool = False,
) -> torch.Tensor:
    """Rotates the first ``heads`` heads of each token; features after them are copied.

    A head ``(a, b)`` of two halves becomes ``(a, b) * cos + (-b, a) * sin``.

    Args:
        x: ``[..., features]`` with at least ``heads * head_dim`` features, or in lanes.
        cos, sin: ``[..., head_dim]`` with the leading extents of ``x``, or in lanes like ``x``.

    Returns:
        A tensor like ``x``.
    """
    rows, c, s = (t.transpose(1, 2) if lanes else t for t in (x, cos, sin))
    turned = rows[..., : heads * head_dim].unflatten(-1, (heads, head_dim))
    a, b = turned.chunk(2, dim=-1)
    turned = turned * c.unsqueeze(-2) + torch.cat((-b, a), dim=-1) * s.unsqueeze(-2)
    y = torch.cat((turned.flatten(-2), rows[..., heads * head_dim :]), dim=-1)
    return (y.transpose(1, 2) if lanes else y).contiguous()
