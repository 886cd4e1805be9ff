"""Gated activations."""

import torch

from sparsify import ops
from sparsify.ops import ACTIVATIONS
from tests.ops.eager.case import IN, TOKENS, Case, in_form


def cases(lanes: bool) -> list[Case]:
    found = []
    for number, tokens in enumerate(TOKENS):
        x = torch.randn(*tokens, 2 * IN)
        activation = list(ACTIVATIONS)[number]
        y = ACTIVATIONS[activation](x[..., :IN].double()) * x[..., IN:].double()
        args = (ops.to_lanes.reference(x) if lanes else x, activation, lanes)
        found.append(Case("gated", args, in_form(y.float(), lanes), label=f"{activation}-{tokens}"))
    return found
