"""Conversions between rows and lanes."""

import torch

from tests.ops.eager.case import IN, TOKENS, Case, by_hand


def cases(lanes: bool) -> list[Case]:
    found = []
    for tokens in [*TOKENS, (), (4,), (2, 3, 4)]:
        x = torch.randn(*tokens, IN)
        if lanes:
            found.append(Case("to_lanes", (x,), by_hand(x), label=str(tokens)))
        else:
            packed = by_hand(x)
            packed = torch.where(packed == 0, torch.nan, packed)
            found.append(Case("from_lanes", (packed, list(tokens)), x, label=str(tokens)))
    return found
