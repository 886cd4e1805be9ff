"""Normalisation over features, of rows or in lanes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsify.ops.library import declare


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    epsilon: float,
    kind: str = "layer",
    lanes: bool = False,
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@declare(
    "fused_norm(Tensor x, Tensor? weight, Tensor? bias, float epsilon, str kind='layer', "
    "bool lanes=False) -> Tensor",
    _fake,
)
def fused_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    epsilon: float,
    kind: str = "layer",
    lanes: bool = False,
) -> torch.Tensor:
    """Layer normalisation (``kind="layer"``) or root-mean-square normalisation (``"rms"``).

    Args:
        x: ``[..., features]``, or ``[groups, features, 16]`` with ``lanes``.
        weight, bias: ``[features]``; RMS takes no bias.

    Returns:
        A tensor like ``x``.
    """
    rows = x.transpose(1, 2) if lanes else x
    shape = (rows.shape[-1],)
    if kind == "layer":
        y = F.layer_norm(rows, shape, weight, bias, epsilon)
    else:
        y = F.rms_norm(rows, shape, weight, epsilon)
    return (y.transpose(1, 2) if lanes else y).contiguous()
