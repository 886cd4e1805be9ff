"""Linears of every layout."""

import torch
from torch.nn import functional as F

from sparsify import ops
from sparsify.layouts import parse
from sparsify.ops import ACTIVATIONS
from tests.ops.eager.case import IN, OUT, TOKENS, Case, in_form

LAYOUTS = ["csr", "dense", "packed_dense{rows=6}", "sell{rows=4,k_block=8,window=8}"]


def cases(lanes: bool) -> list[Case]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(OUT, IN, generator=generator)
    weight *= torch.rand(OUT, IN, generator=generator) < 0.4
    bias = torch.randn(OUT, generator=generator)
    found = []
    for number, tokens in enumerate(TOKENS):
        x = torch.randn(*tokens, IN, generator=generator)
        residual = torch.randn(*tokens, OUT, generator=generator)
        layout = LAYOUTS[number % len(LAYOUTS)]
        activation = list(ACTIVATIONS)[number % len(ACTIVATIONS)]
        packed = parse(layout).pack(weight)
        tensors = [packed[name] for name in parse(layout).tensors]
        y = F.linear(x, weight, bias if number % 2 else None)
        y = ACTIVATIONS[activation](y) + residual
        operands = (
            (ops.to_lanes.reference(x) if lanes else x),
            tensors,
            layout,
            OUT,
            IN,
            bias if number % 2 else None,
            activation,
            ops.to_lanes.reference(residual) if lanes else residual,
            lanes,
        )
        found.append(Case("sparse_linear", operands, in_form(y, lanes), label=f"{layout}-{tokens}"))
    return found
