"""Routers, against a plain program that goes token by token in float64."""

import math
from collections.abc import Callable

import torch

from sparsify.routers import parse
from tests.ops.eager.case import Case

ROUTERS = [
    ("top_k{k=3}", 6),
    ("softmax_top_k{k=2}", 8),
    ("softmax_top_k{k=3,normalise=0}", 5),
    ("sigmoid_top_k{k=2}", 8),
    ("sigmoid_top_k{k=3,normalise=0}", 8),
    ("sigmoid_top_k{k=2,groups=4,kept=2}", 8),
    ("sigmoid_top_k{k=2,normalise=0,groups=4,kept=3}", 4),
    ("threshold{most=0}", 6),
    ("threshold{most=2}", 6),
    ("temperature", 6),
    ("relu_norm", 6),
    ("tree{trees=2}", 14),
    ("tree{trees=3}", 9),
]
"""Each router, and how many logits it takes; every router of ours is among them."""

Picks = list[tuple[int, float]]
"""A token's experts in order, and their weights."""


def parameters_of(spec: str, width: int) -> list[torch.Tensor]:
    router = parse(spec)
    return [torch.rand(shape) * 0.7 + 0.1 for shape in router.shapes(router.experts(width))]


def cases(lanes: bool) -> list[Case]:
    found = []
    for spec, width in [] if lanes else ROUTERS:
        parameters = parameters_of(spec, width)
        for tokens in (1, 7):
            logits = torch.randn(tokens, width)
            expected = by_hand(spec, logits, parameters)
            label = f"{spec}-{width}-{tokens}"
            found.append(Case("route", (logits, spec, parameters), expected, label=label))
    return found


def by_hand(
    spec: str, logits: torch.Tensor, parameters: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    router = parse(spec)
    slots = router.slots(router.experts(logits.shape[1]))
    experts, weights = torch.full((len(logits), slots), -1), torch.zeros(len(logits), slots)
    pick = PICKS[router.name]
    for token, row in enumerate(logits.double().tolist()):
        for slot, (expert, weight) in enumerate(
            pick(router, row, [p.double().tolist() for p in parameters])
        ):
            experts[token, slot], weights[token, slot] = expert, weight
    return experts.int(), weights


def best(keys: list[float], count: int) -> list[int]:
    return sorted(range(len(keys)), key=lambda e: -keys[e])[:count]


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x - max(logits)) for x in logits]
    return [p / sum(powers) for p in powers]


def plain(router, logits, parameters) -> Picks:
    return [(e, 1.0) for e in best(logits, router.k)]


def softmaxed(router, logits, parameters) -> Picks:
    share = softmax(logits)
    chosen = best(share, router.k)
    total = sum(share[e] for e in chosen) if router.normalise else 1
    return [(e, share[e] / total) for e in chosen]


def sigmoid(router, logits, parameters) -> Picks:
    bias, (scale,) = parameters
    score = [1 / (1 + math.exp(-x)) for x in logits]
    key = [s + b for s, b in zip(score, bias, strict=True)]
    size = len(key) // router.groups
    worth = [sum(sorted(key[g * size : (g + 1) * size])[-2:]) for g in range(router.groups)]
    kept = best(worth, router.kept)
    chosen = [e for e in best(key, len(key)) if e // size in kept][: router.k]
    total = sum(score[e] for e in chosen) if router.normalise else 1
    return [(e, score[e] / total * scale) for e in chosen]


def threshold(router, logits, parameters) -> Picks:
    share, picks, total = softmax(logits), [], 0.0
    for expert in best(share, router.slots(len(share))):
        if picks and total >= parameters[0][0]:
            break
        picks.append((expert, share[expert]))
        total += share[expert]
    return picks


def temperature(router, logits, parameters) -> Picks:
    (cool,), (least,) = parameters
    share = softmax([x / cool for x in logits])
    return [
        (e, share[e]) for i, e in enumerate(best(share, len(share))) if not i or share[e] > least
    ]


def relu_norm(router, logits, parameters) -> Picks:
    weight, (epsilon,) = parameters
    kept = [max(x, 0.0) for x in logits]
    deviation = math.sqrt(sum(x * x for x in kept) / len(kept) + epsilon)
    order = [e for e in best(kept, len(kept)) if kept[e] > 0]
    return [(e, kept[e] / deviation * weight[e]) for e in order]


def tree(router, logits, parameters) -> Picks:
    count, gamma = router.experts(len(logits)), parameters[0][0]
    gates = [0.0] * count
    for number in range(router.trees):
        part = logits[number * (2 * count - 1) :][: 2 * count - 1]
        for expert, reached in enumerate(leaves(part[: count - 1], gamma)):
            gates[expert] += reached * math.exp(part[count - 1 + expert])
    order = [e for e in best(gates, count) if gates[e] > 1e-6 * max(gates)]
    return [(e, gates[e] / sum(gates[e] for e in order)) for e in order]


def leaves(decisions: list[float], gamma: float) -> list[float]:
    """Probabilities of a tree's leaves from left to right, walked down from its root."""

    def below(node: int) -> list[float]:
        if node >= len(decisions):
            return [1.0]
        u = min(max(decisions[node] / gamma, -0.5), 0.5)
        left = -2 * u**3 + 1.5 * u + 0.5
        return [left * p for p in below(2 * node + 1)] + [
            (1 - left) * p for p in below(2 * node + 2)
        ]

    return below(0)


PICKS: dict[str, Callable[..., Picks]] = {
    "top_k": plain,
    "softmax_top_k": softmaxed,
    "sigmoid_top_k": sigmoid,
    "threshold": threshold,
    "temperature": temperature,
    "relu_norm": relu_norm,
    "tree": tree,
}
