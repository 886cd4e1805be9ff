"""Rotary embeddings, against complex numbers."""

import torch

from sparsify import ops
from tests.ops.eager.case import IN, TOKENS, Case, in_form


def cases(lanes: bool) -> list[Case]:
    """Two heads of 4 features turned as complex numbers; the feature behind them is copied."""
    found = []
    for tokens in TOKENS:
        x, angle = torch.randn(*tokens, IN), torch.randn(*tokens, 2)
        cos, sin = (f(torch.cat((angle, angle), -1)) for f in (torch.cos, torch.sin))
        turn = torch.polar(torch.ones_like(angle).double(), angle.double()).unsqueeze(-2)
        heads = x[..., :8].double().unflatten(-1, (2, 2, 2))
        turned = torch.complex(heads[..., 0, :], heads[..., 1, :]) * turn
        y = torch.cat((turned.real, turned.imag), -1).flatten(-2).float()
        y = torch.cat((y, x[..., 8:]), -1)
        operands = (x, cos, sin)
        if lanes:
            operands = tuple(ops.to_lanes.reference(t) for t in operands)
        args = (*operands, 2, 4, lanes)
        found.append(Case("rotary", args, in_form(y, lanes), label=str(tokens)))
    return found
