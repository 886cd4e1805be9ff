"""NaN and infinity through linear layers and what is fused behind them: no activation hides one.

A row of NaN is NaN throughout, in whatever layout the weight is; the rows beside it are as ever.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsify

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
}
GATES = {
    "relu gate": F.relu,
    "silu gate": F.silu,
}
SHARES = (0.0, 0.9)
"""Of zeros."""
FEATURES, HIDDEN = 96, 64


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict()
        for share in SHARES:
            for name in ACTIVATIONS:
                self._add(f"{name} {share}", HIDDEN, share)
            for name in GATES:
                self._add(f"{name} {share}", 2 * HIDDEN, share)

    def _add(self, name, out, share):
        layer = nn.Linear(FEATURES, out)
        kept = torch.rand(layer.weight.shape) >= share
        kept[torch.arange(out), torch.arange(out) % FEATURES] = True  # no empty rows
        layer.weight.data.mul_(kept)
        self.layers[name.replace(".", "_")] = layer

    def forward(self, x):
        results = {}
        for share in SHARES:
            for name, activation in {**ACTIVATIONS, **GATES}.items():
                y = self.layers[f"{name} {share}".replace(".", "_")](x)
                if name in ACTIVATIONS:
                    results[f"{name} {share}"] = activation(y)
                else:
                    gate, up = y.chunk(2, -1)
                    results[f"{name} {share}"] = activation(gate) * up
        return results


@pytest.fixture(scope="module", params=[3, 40], ids=["few tokens", "many tokens"])
def results(request):
    model = Layers().eval()
    x = torch.randn(request.param, FEATURES)
    x[1] = math.nan
    x[2] = torch.where(torch.arange(FEATURES) == 7, math.inf, 0.0)
    compiled = sparsify.compile(model, (x,), cache=False, dynamic_shapes=None, num_threads=1)
    layouts = {d.layout.partition("{")[0] for d in compiled.report.decisions if d.layout}
    assert layouts & {"sell", "bitmap"}  # some kernels are sparse, whatever the CPU
    with torch.no_grad():
        return compiled(x), model(x)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", [*ACTIVATIONS, *GATES])
def test_no_activation_hides_a_nan(results, name, share):
    got, expected = (part[f"{name} {share}"] for part in results)
    assert got[1].isnan().all()
    finite = [0, *range(3, len(got))]
    torch.testing.assert_close(got[finite], expected[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["relu", "clamp"])
def test_infinity_is_bounded_or_kept(results, name):
    """A dense layer gives infinities of either sign here; 0 * inf is NaN for the rest."""
    got, expected = (part[f"{name} 0.0"] for part in results)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=1e-6, equal_nan=True)
