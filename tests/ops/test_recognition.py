"""Routers written as their papers write them are told from each other."""

from collections.abc import Callable

import pytest
import torch

from sparsify.routers import Seen, Tree, gates_of, recognise

EXPERTS = 8
BIAS = torch.linspace(-0.3, 0.3, EXPERTS)[torch.tensor([3, 0, 6, 1, 7, 2, 5, 4])]

Code = Callable[[torch.Tensor], torch.Tensor]


def spread(weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(weights), EXPERTS).scatter(1, experts, weights)


def softmax(logits: torch.Tensor) -> torch.Tensor:
    values, experts = logits.topk(3)
    return spread(values.softmax(-1), experts)


def sigmoid(logits: torch.Tensor) -> torch.Tensor:
    scores = logits.sigmoid()
    experts = (scores + BIAS).topk(3).indices
    return spread(2.5 * scores.gather(1, experts), experts)


def threshold(logits: torch.Tensor) -> torch.Tensor:
    values, experts = logits.softmax(-1).sort(dim=-1, descending=True)
    before = values.cumsum(-1) - values
    return spread(values * (before < 0.8), experts)


def temperature(logits: torch.Tensor) -> torch.Tensor:
    gates = torch.softmax(logits / 0.3, -1)
    first = gates == gates.amax(-1, keepdim=True)
    return torch.where((gates > 0.1) | first, gates, 0.0)


def relu_norm(logits: torch.Tensor) -> torch.Tensor:
    kept = logits.relu()
    return kept * torch.rsqrt(kept.pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + BIAS)


def tree(logits: torch.Tensor) -> torch.Tensor:
    return gates_of(*Tree(1).route(logits, torch.tensor([1.0])), EXPERTS)


@pytest.mark.parametrize(
    ("code", "seen", "spec", "parameters"),
    [
        (softmax, Seen(EXPERTS, 3), "softmax_top_k{k=3,normalise=1}", ()),
        (
            sigmoid,
            Seen(EXPERTS, None, (3.0, 2.5), (BIAS,)),
            "sigmoid_top_k{k=3,normalise=0,groups=1,kept=1}",
            (BIAS, torch.tensor([2.5])),
        ),
        (threshold, Seen(EXPERTS, None, (0.8,)), "threshold{most=0}", (torch.tensor([0.8]),)),
        (
            temperature,
            Seen(EXPERTS, None, (0.3, 0.1)),
            "temperature",
            (torch.tensor([0.3]), torch.tensor([0.1])),
        ),
        (
            relu_norm,
            Seen(EXPERTS, None, (1e-5, 2.0), (1 + BIAS,)),
            "relu_norm",
            (1 + BIAS, torch.tensor([1e-5])),
        ),
        (tree, Seen(EXPERTS, None), "tree{trees=1}", (torch.tensor([1.0]),)),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
@pytest.mark.parametrize("tokens", [1, 10])
def test_a_router_is_known_by_what_it_gives(
    code: Code, seen: Seen, spec: str, parameters: tuple[torch.Tensor, ...], tokens: int
) -> None:
    width = 2 * EXPERTS - 1 if code is tree else EXPERTS
    found = recognise(code, seen, tokens, width)
    assert found is not None and found[0].spec == spec
    for mine, theirs in zip(found[1], parameters, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "changed",
    [
        lambda logits: 1.01 * softmax(logits),
        lambda logits: softmax(logits.clamp(max=10.0)),
        lambda logits: softmax(logits) * (softmax(logits) > 0.2),
    ],
    ids=["a scale", "a clamp", "a cut"],
)
def test_what_is_no_router_of_ours_is_none(changed: Code) -> None:
    assert recognise(changed, Seen(EXPERTS, 3, (0.2, 10.0, 1.01)), 10, EXPERTS) is None
