"""A small model of many operators, and whether a program of it is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

LARGEST = {"x": (3, 40, 48), "keep": (3, 40)}
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


class Net(nn.Module):
    """Attention, a sparse and a dense layer, norms; two inputs that share sizes, two results."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(48, 144)
        self.up = nn.Linear(48, 96)
        self.down = nn.Linear(96, 17)
        self.norm = nn.LayerNorm(48)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> dict[str, torch.Tensor]:
        q, k, v = (t.unflatten(-1, (3, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        h = self.norm(x + attended.transpose(1, 2).flatten(2))
        scores = self.down(nn.functional.gelu(self.up(h)))
        return {"scores": torch.softmax(scores, -1), "kept": h * keep.unsqueeze(-1)}


class Product(nn.Module):
    """A linear alone, which takes no scratch memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def inputs(batch: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, seq, 48), torch.rand(batch, seq)


def check(
    toolchain: Any, program: Path, net: nn.Module, sizes: tuple[int, int], *more: str
) -> None:
    """Runs the program on fresh numbers and compares with PyTorch in float64."""
    given = inputs(*sizes)
    expected = net.double()(*(x.double() for x in given))
    net.float()
    for name, x in zip(("x", "keep"), given, strict=True):
        np.save(program.with_name(f"{name}.npy"), x.numpy())
    toolchain.run(program, *more, "x.npy", "keep.npy", "-o", "scores.npy", "kept.npy")
    for name, wanted in expected.items():
        found = np.load(program.with_name(f"{name}.npy"))
        assert found.dtype == np.float32 and found.shape == wanted.shape
        assert np.abs(found - wanted.detach().numpy()).max() < 1e-5, name
