"""Attention in windows and listed blocks as exported C."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparsify
from sparsify import ops
from sparsify.band import Band
from sparsify.block_mask import BlockMask

LENGTH, HEADS, HEAD_DIM = 150, 2, 16


class Attend(nn.Module):
    """A window with sinks and soft caps, then blocks whose lists are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM)
        kinds = torch.randint(0, 3, (1, HEADS, 3, 5))
        kinds[:, :, torch.arange(3), torch.arange(3)] = 1
        self.mask = BlockMask.of_kinds(kinds, (LENGTH, LENGTH), (64, 32))
        for number, lists in enumerate(self.mask.tensors):
            self.register_buffer(f"lists{number}", lists)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        qkv, features = self.qkv(x), HEADS * HEAD_DIM
        offsets = [0, features, 2 * features]
        parts = (qkv, qkv, qkv)
        heads = (HEADS, HEADS, HEAD_DIM, offsets, 0.25)
        lists = [getattr(self, f"lists{number}") for number in range(4)]
        window = ops.fused_attention.overload(*parts, None, *heads, True, [], 20, 3, 2.0)
        blocks = ops.block_attention.overload(*parts, lists, None, *heads, self.mask.block, True)
        return {"window": window, "blocks": blocks}


@pytest.mark.isa("x86-avx2")
def test_windows_and_blocks_under_sanitizers(tmp_path: Path, host: Any) -> None:
    torch.manual_seed(0)
    net, x = Attend().eval(), torch.randn(1, LENGTH, HEADS * HEAD_DIM)
    compiled = sparsify.compile(net, (x,), dynamic_shapes=None, strict=True)
    with torch.no_grad():
        expected = net(x)
    for name, found in compiled(x).items():
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-5)
    compiled.export_c(tmp_path, target="x86-avx2")
    flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = host.build(tmp_path, flags=flags)
    np.save(tmp_path / "x.npy", x.numpy())
    host.run(program, "x.npy", "-o", "window.npy", "blocks.npy")
    for name, wanted in expected.items():
        found = np.load(program.with_name(f"{name}.npy"))
        assert np.abs(found - wanted.numpy()).max() < 1e-5, name


def test_lists_of_a_band_are_the_band(tmp_path: Path) -> None:
    """A window said by its size and the same window in blocks give the same program's results."""
    band, shape = Band(causal=True, window=40, sinks=5), (1, 200, HEADS * HEAD_DIM)
    lists = BlockMask.of_band(band, (200, 200)).tensors

    class Both(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lists: torch.Tensor):
            heads = (HEADS, HEADS, HEAD_DIM, [0, 0, 0], 0.25)
            said = (True, [], band.window, band.sinks)
            listed = (True, band.window, band.sinks)
            return (
                ops.fused_attention.overload(q, k, v, None, *heads, *said),
                ops.block_attention.overload(q, k, v, list(lists), None, *heads, [64, 64], *listed),
            )

    inputs = (*(torch.randn(shape) for _ in range(3)), *lists)
    compiled = sparsify.compile(Both().eval(), inputs, dynamic_shapes=None, strict=True)
    one, other = compiled(*inputs)
    torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(one, Both()(*inputs)[0], atol=1e-5, rtol=1e-5)
