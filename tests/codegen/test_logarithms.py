"""Logarithms near one keep their digits: against float64, relative to each result."""

import torch
import torch.nn.functional as F

import sparsify

INF = float("inf")


class Logarithms(torch.nn.Module):
    def forward(self, x):
        return torch.log1p(x), F.softplus(x), F.softplus(x, 2.0, 5.0)


def test_small_results_are_exact_too():
    torch.manual_seed(0)
    exponents = torch.linspace(-40, 30, 3001)
    wide = torch.cat([2**exponents, -(2 ** exponents.clamp(max=6))])
    special = torch.tensor([0.0, -0.0, -1.0, -0.99999994, INF, -INF, 1e-45, 20.0, 20.5, 2.5, 2.6])
    x = torch.cat([wide, torch.randn(1000), special])
    compiled = sparsify.compile(Logarithms(), (x,), num_threads=1, strict=True)
    for found, expected in zip(compiled(x), Logarithms()(x.double()), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=6e-7, atol=2e-45, equal_nan=True)


def test_integers_and_float64():
    class Net(torch.nn.Module):
        def forward(self, ids):
            return torch.log1p(ids), torch.log1p(ids.double() * 1e-12)

    ids = torch.arange(7)
    compiled = sparsify.compile(Net(), (ids,), num_threads=1, strict=True)
    for found, expected in zip(compiled(ids), Net()(ids), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
