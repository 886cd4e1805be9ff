"""Factories of tiny models, named on the command line as ``tiny.py:NAME``."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Linear, GELU, linear, residual, LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(nn.functional.gelu(self.up(x))))


def make(batch: int = 2, seq: int = 8) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """Half of the weights of ``up`` are zero."""
    torch.manual_seed(0)
    model = Block()
    with torch.no_grad():
        model.up.weight[:, ::2] = 0
    return model, (torch.randn(batch, seq, 32),)


def single() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return nn.Linear(48, 80).eval(), (torch.randn(16, 48),)


def without_inputs() -> nn.Module:
    return make()[0]


def not_a_model() -> str:
    return "nothing"


class Unsupported(nn.Module):
    """Its middle is outside what is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.special.bessel_j0(self.inner(x)))


def unsupported() -> tuple[nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return Unsupported(), (torch.randn(2, 8, 32),)


class Random(nn.Module):
    """Never gives the same result twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.rand_like(x)


def random() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return Random(), (torch.randn(2, 8, 32),)
