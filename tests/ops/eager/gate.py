"""Gates, feature by feature."""

import math
import statistics

import torch

from sparsify import ops
from tests.ops.eager.case import IN, TOKENS, Case, in_form

LIMITS = torch.linspace(0.1, 1.5, IN)
QUANTILE = statistics.NormalDist().inv_cdf(1 - 3 / IN)


RULES = {
    "threshold": (
        (torch.tensor([0.7]),),
        lambda row: [abs(v) > 0.7 for v in row],
    ),
    "channel_threshold": (
        (LIMITS,),
        lambda row: [abs(v) > limit for v, limit in zip(row, LIMITS.tolist(), strict=True)],
    ),
    "top_k{k=3}": (
        (),
        lambda row: [abs(v) >= sorted(map(abs, row))[-3] for v in row],
    ),
    "weighted_top_k{k=3}": (
        (LIMITS,),
        lambda row: [
            abs(v) * w >= sorted(abs(u) * z for u, z in zip(row, LIMITS.tolist(), strict=True))[-3]
            for v, w in zip(row, LIMITS.tolist(), strict=True)
        ],
    ),
    "statistical_top_k{k=3}": (
        (),
        lambda row: [v > math.fsum(row) / len(row) + QUANTILE * statistics.stdev(row) for v in row],
    ),
}


def cases(lanes: bool) -> list[Case]:
    found = []
    for tokens in TOKENS:
        for rule, (parameters, keep) in RULES.items():
            x = torch.randn(*tokens, IN, dtype=torch.float64)
            kept = torch.tensor([keep(row) for row in x.reshape(-1, IN).tolist()])
            y = torch.where(kept.reshape(x.shape), x, 0).float()
            given = ops.to_lanes.reference(x.float()) if lanes else x.float()
            args = (given, rule, list(parameters), lanes)
            found.append(Case("gate", args, in_form(y, lanes), label=f"{rule}-{tokens}"))
    return found
