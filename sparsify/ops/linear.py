"""The linear operator with its weight in any layout and its epilogue inside.

y = activation(x @ W.T + bias) + residual
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from sparsify.layouts import parse
from sparsify.ops.lanes import lane_groups_of_features
from sparsify.ops.library import declare

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
"""Activations a kernel can apply before it stores; the names are the operator's attribute."""


def _fake(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    layout: str,
    out_features: int,
    in_features: int,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    lanes: bool = False,
) -> torch.Tensor:
    features = x.shape[-2] if lanes else x.shape[-1]
    torch._check(
        features == in_features,
        lambda: (
            f"sparse_linear: x has {features} features in shape {tuple(x.shape)}, "
            f"the weight takes {in_features}"
        ),
    )
    if lanes:
        return x.new_empty((x.shape[0], out_features, x.shape[2]))
    return x.new_empty((*x.shape[:-1], out_features))


@declare(
    "sparse_linear(Tensor x, Tensor[] weight, str layout, int out_features, int in_features, "
    "Tensor? bias=None, str activation='none', Tensor? residual=None, bool lanes=False) -> Tensor",
    _fake,
)
def sparse_linear(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    layout: str,
    out_features: int,
    in_features: int,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    lanes: bool = False,
) -> torch.Tensor:
    """``activation(x @ W.T + bias) + residual``.

    Args:
        x: ``[..., in_features]``, or ``[groups, in_features, 16]`` with ``lanes``.
        weight: the layout's tensors, in the order of ``Layout.tensors``.
        layout: a layout spec, ``csr`` or ``sell{rows=8,k_block=384,window=128}``.
        residual: of the output's shape.

    Returns:
        ``[..., out_features]``, or ``[groups, out_features, 16]`` with ``lanes``.
    """
    storage = parse(layout)
    packed = dict(zip(storage.tensors, weight, strict=True))
    dense = storage.unpack(packed, (out_features, in_features)).to(x.dtype)
    rows = lane_groups_of_features(x) if lanes else x
    y = ACTIVATIONS[activation](F.linear(rows, dense, bias))
    if lanes:
        y = y.transpose(1, 2)
    return (y if residual is None else y + residual).contiguous()
