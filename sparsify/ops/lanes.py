"""Conversions between row-major activations and activations in lanes.

In lanes, 16 tokens stand side by side and features are major: ``[ceil(tokens/16), features, 16]``.
All tokens of a batch are one run; only the last group has unused lanes, filled with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import optimization_hint

from sparsify.layouts import FEW_TOKENS, LANES
from sparsify.ops.library import declare


def lane_groups_of_features(x: torch.Tensor) -> torch.Tensor:
    """``[groups, features, 16]`` -> ``[groups, 16, features]``: a view with tokens as rows."""
    return x.transpose(1, 2)


def lane_groups(tokens: int | torch.SymInt) -> int | torch.SymInt:
    return (tokens + LANES - 1) // LANES


def token_count(shape: Sequence[int | torch.SymInt]) -> int | torch.SymInt:
    count: int | torch.SymInt = 1
    for extent in shape:
        count = count * extent
    return count


def expected_tokens(rows: torch.Tensor) -> int:
    """Tokens of a row-major activation for which kernels are chosen; adds no guard.

    Those of the example inputs, but a lane group where they are few and there may be more: kernels
    for few tokens are slower on many than the other way round.
    """
    count = token_count(rows.shape[:-1])
    if isinstance(count, int):
        return count
    expected = optimization_hint(count, fallback=1)
    most = count.node.shape_env.bound_sympy(count.node.expr).upper
    return LANES if expected <= FEW_TOKENS < most else expected


def _fake_to_lanes(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((lane_groups(token_count(x.shape[:-1])), x.shape[-1], LANES))


@declare("to_lanes(Tensor x) -> Tensor", _fake_to_lanes)
def to_lanes(x: torch.Tensor) -> torch.Tensor:
    """``[..., features]`` -> ``[ceil(tokens/16), features, 16]``; unused lanes are zero."""
    rows = x.reshape(-1, x.shape[-1])
    rows = F.pad(rows, (0, 0, 0, -rows.shape[0] % LANES))
    return rows.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def _fake_from_lanes(x: torch.Tensor, leading: Sequence[int]) -> torch.Tensor:
    return x.new_empty((*leading, x.shape[1]))


@declare("from_lanes(Tensor x, SymInt[] leading) -> Tensor", _fake_from_lanes)
def from_lanes(x: torch.Tensor, leading: Sequence[int]) -> torch.Tensor:
    """``[ceil(tokens/16), features, 16]`` -> ``[*leading, features]``, dropping unused lanes."""
    rows = lane_groups_of_features(x).reshape(-1, x.shape[1])
    return rows[: token_count(leading)].reshape(*leading, x.shape[1]).contiguous()
