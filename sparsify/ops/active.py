"""Linears that need not compute what is not active: inputs, or outputs, that are exactly zero.

A gate (or ReLU) makes the zeros, these operators only skip them. What they compute does not depend
on how many there are, so rules that make zeros and kernels that skip them know nothing of each
other.

Source: Liu et al., "Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsify.ops.library import declare
from sparsify.ops.linear import sparse_linear


def union_share(active: float, tokens: int) -> float:
    """Expected share of features that at least one of some tokens has active.

    Args:
        active: share that one token has. Tokens are taken to be independent, which is the worst
            that one may expect: real ones agree more often than chance.
    """
    return 1.0 - (1.0 - min(1.0, max(0.0, active))) ** tokens


def _check(operator: str, x: torch.Tensor, in_features: int, active: float) -> None:
    torch._check(
        x.shape[-1] == in_features,
        lambda: (
            f"{operator}: x has {x.shape[-1]} features in shape {tuple(x.shape)}, "
            f"the weight takes {in_features}"
        ),
    )
    torch._check(
        0.0 <= active <= 1.0,
        lambda: f"{operator}: active={active} is no share between 0 and 1",
    )


def _active_fake(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    layout: str,
    out_features: int,
    in_features: int,
    active: float,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    _check("active_linear", x, in_features, active)
    return x.new_empty((*x.shape[:-1], out_features))


@declare(
    "active_linear(Tensor x, Tensor[] weight, str layout, int out_features, int in_features, "
    "float active, Tensor? bias=None, str activation='none', Tensor? residual=None) -> Tensor",
    _active_fake,
)
def active_linear(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    layout: str,
    out_features: int,
    in_features: int,
    active: float,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``activation(x @ W.T + bias) + residual``; zeros of ``x`` need not be multiplied.

    Args:
        x: ``[..., in_features]``. The weight must be finite where ``x`` is zero.
        weight, layout, residual: as `sparse_linear` takes them.
        active: expected share of nonzero features of a token, by which a kernel is chosen; the
            result does not depend on it.

    Returns:
        ``[..., out_features]``.
    """
    y: torch.Tensor = sparse_linear.reference(
        x, weight, layout, out_features, in_features, bias, activation, residual
    )
    return y


def _gated_fake(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: Sequence[torch.Tensor],
    layout: str,
    out_features: int,
    in_features: int,
    active: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    _check("gated_linear", x, in_features, active)
    expected = (*x.shape[:-1], out_features)
    torch._check(
        gate.dim() == x.dim(),
        lambda: (
            f"gated_linear: the gate has shape {tuple(gate.shape)}, the result {tuple(expected)}"
        ),
    )
    for found, wanted in zip(gate.shape, expected, strict=True):
        _check_extent(found, wanted)
    return x.new_empty(expected)


def _check_extent(found: int | torch.SymInt, wanted: int | torch.SymInt) -> None:
    torch._check(
        found == wanted, lambda: f"gated_linear: the gate has extent {found}, the result {wanted}"
    )


@declare(
    "gated_linear(Tensor x, Tensor gate, Tensor[] weight, str layout, int out_features, "
    "int in_features, float active, Tensor? bias=None) -> Tensor",
    _gated_fake,
)
def gated_linear(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: Sequence[torch.Tensor],
    layout: str,
    out_features: int,
    in_features: int,
    active: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``gate * (x @ W.T + bias)``; where the gate is zero nothing need be computed.

    Args:
        x: ``[..., in_features]``, finite as the weight is.
        gate: of the result's shape.
        weight, layout: as `sparse_linear` takes them.
        active: expected share of nonzero features of a token's gate; see `active_linear`.

    Returns:
        ``[..., out_features]``, zero where the gate is.
    """
    y: torch.Tensor = sparse_linear.reference(x, weight, layout, out_features, in_features, bias)
    return gate * y
