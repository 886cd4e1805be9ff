"""Experts, token by token and slot by slot in float64."""

import torch
from torch.nn import functional as F

from sparsify.layouts import parse
from sparsify.ops import ACTIVATIONS, ExpertsShape
from tests.ops.eager.case import TOKENS, Case

LAYOUTS = [
    ("dense", "dense"),
    ("packed_dense{rows=16}", "packed_dense{rows=16}"),
    ("csr", "dense"),
    ("sell{rows=4,k_block=9,window=8}", "sell{rows=8,k_block=64,window=16}"),
]
COUNT, SLOTS, OUT, HIDDEN, IN = 5, 2, 7, 11, 9


def routes(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two experts for each token but for some, which have one or none; one expert has no token."""
    order = torch.rand(tokens, COUNT - 1).argsort(1)[:, :SLOTS].int()
    experts = order.masked_fill(torch.rand(tokens, SLOTS) < 0.2, -1)
    return experts, torch.rand(tokens, SLOTS)


def cases(lanes: bool) -> list[Case]:
    found = []
    for number, extents in enumerate([] if lanes else [*TOKENS, (40,)]):
        gated, bias = bool(number % 2), number % 3 == 0
        activation = list(ACTIVATIONS)[number % len(ACTIVATIONS)]
        layouts = LAYOUTS[number % len(LAYOUTS)]
        shape = ExpertsShape(COUNT, OUT, HIDDEN, IN, gated)
        up = torch.randn(COUNT, shape.parts * HIDDEN, IN) * (torch.rand(1, 1, IN) < 0.6)
        down = torch.randn(COUNT, OUT, HIDDEN)
        biases = [torch.randn(COUNT, shape.parts * HIDDEN), torch.randn(COUNT, OUT)] if bias else []
        x = torch.randn(*extents, IN)
        experts, weights = routes(x.numel() // IN)
        packed = [
            list(stack(parse(layout)).pack(matrices).values())
            for stack, layout, matrices in zip(
                (shape.up, shape.down), layouts, (up, down), strict=True
            )
        ]
        y = by_hand(x, experts, weights, up, down, biases, activation, gated)
        sizes = (COUNT, OUT, HIDDEN, IN)
        args = (x, experts, weights, *packed, biases, *layouts, *sizes, activation, gated)
        found.append(Case("experts", args, y, label=f"{layouts[0]}-{extents}"))
    return found


def by_hand(x, experts, weights, up, down, biases, activation, gated):
    rows = x.reshape(-1, x.shape[-1]).double()
    y = torch.zeros(len(rows), down.shape[1], dtype=torch.float64)
    for token, row in enumerate(rows):
        for expert, weight in zip(experts[token].tolist(), weights[token].tolist(), strict=True):
            if expert < 0:
                continue
            first, second = (b[expert].double() for b in biases) if biases else (None, None)
            inner = F.linear(row, up[expert].double(), first)
            if gated:
                half = len(inner) // 2
                inner = ACTIVATIONS[activation](inner[:half]) * inner[half:]
            else:
                inner = ACTIVATIONS[activation](inner)
            y[token] += weight * F.linear(inner, down[expert].double(), second)
    return y.float().reshape(*x.shape[:-1], down.shape[1])
