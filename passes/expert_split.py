"""A dense feed-forward network split into experts, and a router that chooses among them.

Neurons that are large together become one expert: balanced k-means on what they contribute to the
output over calibration tokens. The router is a ridge regression from the network's input to the
norm of what each expert contributes. An expert that is not chosen gives its mean instead.

Source: Zhang et al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", 2022.
The regression and the means are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsify.ops import ACTIVATIONS

_ROUNDS = 12
"""Of k-means."""

_RIDGE = 1e-2
"""Of the mean square of the inputs."""


@dataclass(frozen=True)
class FeedForward:
    """A network ``down(activation(gate(x)) * up(x))``, or without a gate.

    Attributes:
        up: ``[parts * hidden, in_features]``, the gate's rows first.
        down: ``[out_features, hidden]``.
    """

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor
    down_bias: torch.Tensor
    activation: str
    gated: bool

    @property
    def parts(self) -> int:
        return 2 if self.gated else 1

    @property
    def hidden(self) -> int:
        return self.down.shape[1]

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, hidden]``, what the second projection takes."""
        first, *others = F.linear(x, self.up, self.up_bias).split(self.hidden, -1)
        opened = ACTIVATIONS[self.activation](first)
        return opened * others[0] if others else opened


@dataclass(frozen=True)
class Split:
    """The experts of a network, each of the same number of neurons.

    Attributes:
        up: ``[experts, rows, in_features]``; down: ``[experts, out_features, neurons]``.
        up_bias, down_bias: ``[experts, rows]`` and ``[experts, out_features]``.
        bias: ``[out_features]``, added to the sum over a token's experts.
        router, router_bias: ``[experts, in_features]`` and ``[experts]``.
        cosine, error: of the output to the dense one's over the calibration tokens: the mean
            cosine, and the root of the mean square difference over that of the output.
    """

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor
    down_bias: torch.Tensor
    bias: torch.Tensor
    router: torch.Tensor
    router_bias: torch.Tensor
    cosine: float
    error: float


def split(network: FeedForward, experts: int, top_k: int, x: torch.Tensor) -> Split:
    """Splits a network for tokens like ``x[tokens, in_features]``.

    Raises:
        ValueError: the neurons cannot be parted into so many equal experts.
    """
    if network.hidden % experts:
        raise ValueError(
            f"{network.hidden} neurons cannot be parted into {experts} experts of equal size"
        )
    inner = network.inner(x)
    groups = clusters(inner * network.down.norm(dim=0), experts)
    neurons = [torch.where(groups == e)[0] for e in range(experts)]
    parts = [F.linear(inner[:, own], network.down[:, own]) for own in neurons]
    made = torch.stack(parts, 1)  # [tokens, experts, out_features]
    worth = (made - made.mean(0)).norm(dim=-1)
    router, router_bias = regression(x, worth)
    logits = F.linear(x, router, router_bias)
    chosen = torch.zeros_like(logits).scatter_(1, logits.topk(top_k, dim=1).indices, 1.0)
    missed = (1 - chosen).unsqueeze(-1)
    means = (made * missed).sum(0) / missed.sum(0).clamp_min(1.0)
    bias = network.down_bias + means.sum(0)
    found = ((made - means) * chosen.unsqueeze(-1)).sum(1) + bias
    exact = made.sum(1) + network.down_bias
    rows = [
        torch.cat([own + part * network.hidden for part in range(network.parts)]) for own in neurons
    ]
    return Split(
        torch.stack([network.up[r] for r in rows]),
        torch.stack([network.down[:, own] for own in neurons]).contiguous(),
        torch.stack([network.up_bias[r] for r in rows]),
        -means,
        bias,
        router,
        router_bias,
        float(F.cosine_similarity(found, exact, dim=-1).mean()),
        float((found - exact).norm() / exact.norm().clamp_min(1e-30)),
    )


def clusters(contributions: torch.Tensor, count: int) -> torch.Tensor:
    """The cluster of each neuron, all of one size, by k-means on the sphere.

    Args:
        contributions: ``[tokens, neurons]``; neurons are alike whose columns point alike, whatever
            the sign: what matters is which tokens they are large for.
    """
    points = F.normalize(contributions.abs().t(), dim=1)
    size = len(points) // count
    centres = points[_spread(points, count)]
    groups = torch.zeros(len(points), dtype=torch.int64)
    for _ in range(_ROUNDS):
        groups = _balanced(points @ centres.t(), size)
        sums = torch.zeros_like(centres).index_add_(0, groups, points)
        centres = F.normalize(sums, dim=1)
    return groups


def _spread(points: torch.Tensor, count: int) -> list[int]:
    """Points to begin with: each the least like those before; the first the least like the mean."""
    likeness = points @ F.normalize(points.mean(0), dim=0)
    chosen = [int(likeness.argmin())]
    most = points @ points[chosen[0]]
    while len(chosen) < count:
        chosen.append(int(most.argmin()))
        most = torch.maximum(most, points @ points[chosen[-1]])
    return chosen


def _balanced(likeness: torch.Tensor, size: int) -> torch.Tensor:
    """Each point to a cluster that is like it, none with more than ``size``.

    Points choose in the order of what they would lose by their second choice.
    """
    best = likeness.topk(min(2, likeness.shape[1]), dim=1).values
    order = (best[:, 0] - best[:, -1]).argsort(descending=True)
    groups = torch.empty(len(likeness), dtype=torch.int64)
    free = torch.full((likeness.shape[1],), size)
    for point in order.tolist():
        groups[point] = likeness[point].masked_fill(free == 0, float("-inf")).argmax()
        free[groups[point]] -= 1
    return groups


def regression(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression of ``y[tokens, out]`` from ``x[tokens, in]``: the matrix and the bias."""
    x, y = x.double(), y.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred = x - x_mean
    gram = centred.t() @ centred
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp_min(1e-30))
    matrix = torch.linalg.solve(gram, centred.t() @ (y - y_mean)).t()
    return matrix.float().contiguous(), (y_mean - matrix @ x_mean).float()
