"""Layer and RMS norms."""

import torch
from torch.nn import functional as F

from sparsify import ops
from tests.ops.eager.case import IN, TOKENS, Case, in_form


def cases(lanes: bool) -> list[Case]:
    found = []
    for tokens in TOKENS:
        for kind in ("layer", "rms"):
            x = torch.randn(*tokens, IN) * 4 + 1
            weight, bias = torch.rand(IN), torch.rand(IN) if kind == "layer" else None
            if kind == "layer":
                y = F.layer_norm(x, (IN,), weight, bias, 1e-3)
            else:
                y = x / (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt().float() * weight
            x = ops.to_lanes.reference(x) if lanes else x
            args = (x, weight, bias, 1e-3, kind, lanes)
            found.append(Case("fused_norm", args, in_form(y, lanes), label=f"{kind}-{tokens}"))
    return found
