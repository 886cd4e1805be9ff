"""The feed-forward networks of a mixture of experts, each on the tokens that were sent to it.

Sources: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
Layer", 2017; Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2022;
Tan et al., "Scattered Mixture-of-Experts Implementation", 2024. No token is dropped, none padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsify.layouts import Layout, Stack, parse
from sparsify.ops.library import declare
from sparsify.ops.linear import ACTIVATIONS


@dataclass(frozen=True)
class ExpertsShape:
    """The static sizes of a layer's experts.

    Attributes:
        count: experts.
        out_features, hidden, in_features: of one expert.
        gated: whether an expert has a gate, so that its first projection has ``2 * hidden`` rows,
            those of the gate first.
    """

    count: int
    out_features: int
    hidden: int
    in_features: int
    gated: bool

    @property
    def parts(self) -> int:
        """Matrices of an expert's first projection."""
        return 2 if self.gated else 1

    def up(self, layout: Layout) -> Stack:
        """The first projections: of each expert the gate, if any, and then up."""
        return Stack(layout, self.count * self.parts, self.hidden, self.in_features)

    def down(self, layout: Layout) -> Stack:
        return Stack(layout, self.count, self.out_features, self.hidden)


def _fake(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor],
    up_layout: str,
    down_layout: str,
    count: int,
    out_features: int,
    hidden: int,
    in_features: int,
    activation: str,
    gated: bool = True,
) -> torch.Tensor:
    torch._check(
        x.shape[-1] == in_features,
        lambda: (
            f"experts: x has {x.shape[-1]} features in shape {tuple(x.shape)}, "
            f"the experts take {in_features}"
        ),
    )
    torch._check(
        len(bias) in (0, 2), lambda: f"experts: {len(bias)} biases; give none, or up's and down's"
    )
    return x.new_empty((*x.shape[:-1], out_features))


@declare(
    "experts(Tensor x, Tensor experts, Tensor weights, Tensor[] up, Tensor[] down, Tensor[] bias, "
    "str up_layout, str down_layout, int count, int out_features, int hidden, int in_features, "
    "str activation, bool gated=True) -> Tensor",
    _fake,
)
def experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor],
    up_layout: str,
    down_layout: str,
    count: int,
    out_features: int,
    hidden: int,
    in_features: int,
    activation: str,
    gated: bool = True,
) -> torch.Tensor:
    """``sum_slots weight * expert(x)`` for each token, over the experts that it was sent to.

    An expert is ``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))``.

    Args:
        x: ``[..., in_features]``.
        experts: int32 ``[tokens, slots]``; -1: the slot is not used.
        weights: ``[tokens, slots]``.
        up, down: the tensors of `ExpertsShape.up` and `ExpertsShape.down` in their layouts; plain
            ones may be ``[count, rows, columns]``, and are so in programs.
        bias: none, or up's ``[count, rows]`` and down's ``[count, out_features]``.

    Returns:
        ``[..., out_features]``; zeros for a token that was sent nowhere.

    Raises:
        IndexError: when a token is sent to an expert below -1, or to one that is none of ``count``.
            The body in ONNX, which cannot raise, takes such slots for unused.
    """
    if ((experts < -1) | (experts >= count)).any():
        raise IndexError(f"experts: a token is sent to an expert that is none of {count}")
    shape = ExpertsShape(count, out_features, hidden, in_features, gated)
    first, second = shape.up(parse(up_layout)), shape.down(parse(down_layout))
    ups = first.unpack(first.named(up)).to(x.dtype).unflatten(0, (count, -1)).flatten(1, 2)
    downs = second.unpack(second.named(down)).to(x.dtype)
    rows = x.reshape(-1, in_features)
    y = rows.new_zeros((rows.shape[0], out_features))
    for expert in range(count):
        tokens, slots = torch.where(experts == expert)
        inner = F.linear(rows[tokens], ups[expert], bias[0][expert] if bias else None)
        opened, *others = inner.split(hidden, dim=-1)
        opened = ACTIVATIONS[activation](opened)
        for other in others:
            opened = opened * other
        result = F.linear(opened, downs[expert], bias[1][expert] if bias else None)
        y.index_add_(0, tokens, result * weights[tokens, slots, None])
    return y.reshape(*x.shape[:-1], out_features)
