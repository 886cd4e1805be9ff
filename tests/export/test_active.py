"""Linears that skip zeros, as C: a gated network of one token equals eager PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import sparsify

FEATURES, INNER = 48, 70


class Gated(nn.Module):
    """Of the gate's outputs, about three quarters are zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(FEATURES, INNER)
        self.up = nn.Parameter(torch.randn(INNER, FEATURES) / 7)
        self.down = nn.Parameter(torch.randn(FEATURES, INNER) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.relu(self.gate(x) - 0.4)
        inner = torch.ops.sparsify.gated_linear(x, gate, [self.up], "dense", INNER, FEATURES, 0.25)
        y: torch.Tensor = torch.ops.sparsify.active_linear(
            inner, [self.down], "dense", FEATURES, INNER, 0.25
        )
        return y


def test_a_gated_network_skips_in_c_too(host: Any, tmp_path: Path) -> None:
    net, x = Gated().eval(), torch.randn(1, FEATURES)
    compiled = sparsify.compile(net, (x,), dynamic_shapes=None)
    layouts = {d.site: d.layout for d in compiled.report if d.made_by == "select_layout"}
    assert layouts["up"] == "dense" and "dense_columns" in str(layouts["down"])
    compiled.export_c(tmp_path, target="x86-avx2", largest={})
    program = host.build(tmp_path)
    np.save(tmp_path / "x.npy", x.numpy())
    host.run(program, "x.npy", "-o", "y.npy")
    found = torch.from_numpy(np.load(tmp_path / "y.npy"))
    with torch.no_grad():
        torch.testing.assert_close(found, net(x), atol=1e-5, rtol=1e-5)
