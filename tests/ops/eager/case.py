"""One call of an operator, and activations in lanes made by hand."""

from dataclasses import dataclass, field
from typing import Any

import torch

from sparsify.layouts import LANES

TOKENS = [(1, 1), (3, 5), (2, 8), (1, 16), (5, 7)]
OUT, IN = 7, 9


@dataclass(frozen=True)
class Case:
    """One call: operator, operands, what it must return, and what it must write, by position."""

    operator: str
    args: tuple[Any, ...]
    expected: torch.Tensor | tuple[torch.Tensor, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    written: dict[int, torch.Tensor] = field(default_factory=dict)

    def own_args(self) -> tuple[Any, ...]:
        """The operands, with copies of those that the operator writes."""
        return tuple(a.clone() if i in self.written else a for i, a in enumerate(self.args))


def by_hand(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    lanes = torch.zeros(-(-len(rows) // LANES), x.shape[-1], LANES)
    for token, row in enumerate(rows):
        lanes[token // LANES, :, token % LANES] = row
    return lanes


def in_form(y: torch.Tensor, lanes: bool) -> torch.Tensor:
    return by_hand(y) if lanes else y
