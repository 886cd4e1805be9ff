"""The gate of a gated feed-forward network, on gate and up projections that ran as one.

Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import torch

from sparsify.ops.library import declare
from sparsify.ops.linear import ACTIVATIONS


def _fake(x: torch.Tensor, activation: str, lanes: bool = False) -> torch.Tensor:
    if lanes:
        return x.new_empty((x.shape[0], x.shape[1] // 2, x.shape[2]))
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@declare("gated(Tensor x, str activation, bool lanes=False) -> Tensor", _fake)
def gated(x: torch.Tensor, activation: str, lanes: bool = False) -> torch.Tensor:
    """``activation(gate) * up``, the gate being the first half of the features, up the second.

    Args:
        x: ``[..., 2 * features]``, or ``[groups, 2 * features, 16]`` with ``lanes``.
        activation: one of `ACTIVATIONS`.

    Returns:
        ``[..., features]``, or ``[groups, features, 16]``.
    """
    gate, up = x.chunk(2, dim=1 if lanes else -1)
    return (ACTIVATIONS[activation](gate) * up).contiguous()
