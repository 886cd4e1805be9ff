"""Linears with inputs or outputs that are mostly zero."""

import torch
from torch.nn import functional as F

from sparsify.layouts import parse
from sparsify.ops import ACTIVATIONS
from tests.ops.eager.case import IN, OUT, TOKENS, Case
from tests.ops.eager.linear import LAYOUTS


def cases(lanes: bool) -> list[Case]:
    """Row-major alone: the operators have no lanes."""
    if lanes:
        return []
    weight = torch.randn(OUT, IN) * (torch.rand(OUT, IN) < 0.7)
    bias, found = torch.randn(OUT), []
    for number, tokens in enumerate(TOKENS):
        layout = LAYOUTS[number % len(LAYOUTS)]
        packed = parse(layout).pack(weight)
        tensors, label = [packed[t] for t in parse(layout).tensors], f"{layout}-{tokens}"
        activation = list(ACTIVATIONS)[number % len(ACTIVATIONS)]
        x = torch.randn(*tokens, IN) * (torch.rand(*tokens, IN) < 0.3)
        residual = torch.randn(*tokens, OUT)
        some_bias = bias if number % 2 else None
        y = ACTIVATIONS[activation](F.linear(x, weight, some_bias)) + residual
        args = (x, tensors, layout, OUT, IN, 0.3, some_bias, activation, residual)
        found.append(Case("active_linear", args, y, label=label))
        x, gate = torch.randn(*tokens, IN), torch.randn(*tokens, OUT)
        gate = gate * (torch.rand(*tokens, OUT) < 0.3)
        y = gate * F.linear(x, weight, some_bias)
        args = (x, gate, tensors, layout, OUT, IN, 0.3, some_bias)
        found.append(Case("gated_linear", args, y, label=label))
    return found
