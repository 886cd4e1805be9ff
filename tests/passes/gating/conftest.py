"""A block with a gated network, and its portable program."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsify.calibration import Calibration
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.program import ProgramSet

FEATURES, INNER = 24, 40


class Block(nn.Module):
    """Two gated networks, one with biases, each with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.ModuleList(nn.Linear(FEATURES, INNER, bias=b) for b in (False, True))
        self.up = nn.ModuleList(nn.Linear(FEATURES, INNER, bias=b) for b in (False, True))
        self.down = nn.ModuleList(nn.Linear(INNER, FEATURES, bias=b) for b in (False, True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for gate, up, down in zip(self.gate, self.up, self.down, strict=True):
            x = x + down(F.silu(gate(x)) * up(x))
        return x


@pytest.fixture
def block() -> Block:
    return Block().eval()


@pytest.fixture
def portable(import_model: Callable[..., ProgramSet]) -> Callable[[nn.Module], ProgramSet]:
    def load(model: nn.Module) -> ProgramSet:
        return run_pipeline(import_model(model, torch.randn(3, FEATURES)), PORTABLE).programs

    return load


@pytest.fixture
def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(5)
    return Calibration([2 * torch.randn(n, FEATURES, generator=generator) for n in (40, 25)])
