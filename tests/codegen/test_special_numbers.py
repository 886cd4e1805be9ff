"""Infinities, NaN and rounding, compiled as PyTorch has them: all in one module, built once."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsify

INF, NAN = math.inf, math.nan
NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -2.5, 3.0, -3.0, 7.25, 1e-8, 1e20, -1e20, INF, -INF, NAN]
ROWS = torch.tensor(
    [
        [-INF, -INF, -INF, -INF],
        [INF, INF, INF, INF],
        [NAN, NAN, NAN, NAN],
        [1, NAN, 2, 3],
        [1, 2, 3, NAN],
        [-INF, -INF, 1, -INF],
        [2, 3, 3, 1],
    ]
)
ZEROS = torch.tensor([0.0, -0.0, NAN, -0.0, -NAN, 0.0, -INF, -1e-45])

CASES = {
    "maximum": lambda x, y, r: torch.maximum(x, y),
    "minimum": lambda x, y, r: torch.minimum(x, y),
    "maximum of one row": lambda x, y, r: torch.maximum(r, r[:1]),
    "clamp": lambda x, y, r: x.clamp(-0.5, 2),
    "clamp by tensors": lambda x, y, r: torch.clamp(x, y, y + 1),
    "relu": lambda x, y, r: x.relu(),
    "hardtanh": lambda x, y, r: F.hardtanh(x, -2, 0.75),
    "hardsigmoid": lambda x, y, r: F.hardsigmoid(x),
    "hardswish": lambda x, y, r: F.hardswish(x.clamp(max=9)),
    "elu": lambda x, y, r: F.elu(x, 0.7),
    "celu": lambda x, y, r: F.celu(x, 0.7),
    "softshrink": lambda x, y, r: F.softshrink(x, 0.6),
    "amax": lambda x, y, r: r.amax(-1),
    "amin kept": lambda x, y, r: r.amin(0, keepdim=True),
    "amax of two dims": lambda x, y, r: r[:1].amax((0, 1)),
    "max of all": lambda x, y, r: r[:1].max(),
    "max along a dim": lambda x, y, r: torch.max(r, -1),
    "min along a dim": lambda x, y, r: torch.min(r, 0, keepdim=True),
    "argmax": lambda x, y, r: r.argmax(-1),
    "argmin kept": lambda x, y, r: r.argmin(0, keepdim=True),
    "argmax of all": lambda x, y, r: r[:2].argmax(),
    "sort": lambda x, y, r: torch.sort(r, stable=True),
    "sort downwards": lambda x, y, r: torch.sort(r, dim=0, descending=True, stable=True),
    "sort of zeros": lambda x, y, r: torch.sort(torch.cat([r[0], ZEROS]), stable=True),
    "sort of float64": lambda x, y, r: torch.sort(x.double(), dim=0, stable=True)[0],
    "sort of truth values": lambda x, y, r: torch.sort(r > 2, stable=True),
    "argsort": lambda x, y, r: torch.argsort(r, dim=-1, stable=True),
    "argsort downwards": lambda x, y, r: torch.argsort(r, dim=0, descending=True, stable=True),
    "largest": lambda x, y, r: torch.topk(r, 3)[0],
    "smallest": lambda x, y, r: torch.topk(x, 3, 0, largest=False)[0],
    "max pool": lambda x, y, r: F.max_pool2d(r[None], 2, 1, 1),
    "max pool of one dim": lambda x, y, r: F.max_pool1d(r[None], 3, 2, 1, 2),
    "max pool of three": lambda x, y, r: F.max_pool3d(
        r[None, None, None], (1, 2, 2), ceil_mode=True
    ),
    "unequal": lambda x, y, r: x != y,
    "unequal to itself": lambda x, y, r: x != x,
    "equal to itself": lambda x, y, r: torch.logical_not(x == x),
    "not less": lambda x, y, r: torch.logical_not(x < y),
    "finite": lambda x, y, r: x.isfinite(),
    "any": lambda x, y, r: r.any(-1),
    "rounded by a large number": lambda x, y, r: (x + 12582912.0) - 12582912.0,
    "sum less a term": lambda x, y, r: (x + y) - y,
    "times zero": lambda x, y, r: x * 0,
    "one over zero": lambda x, y, r: (x * 0).reciprocal(),
    "over zero": lambda x, y, r: x / 0.0,
    "zero over it": lambda x, y, r: 0.0 / x,
    "remainder": lambda x, y, r: torch.remainder(x, y),
    "remainder by a number": lambda x, y, r: x % -0.7,
    "floor divide": lambda x, y, r: torch.div(x, y, rounding_mode="floor"),
    "floor divide by a number": lambda x, y, r: x // 0.7,
    "bytes above zero": lambda x, y, r: r[3:5].isnan().char().clamp(min=0),
    "bytes less than zero": lambda x, y, r: (r[3:5].isnan().char() - 1) < 0,
    "bytes overflow": lambda x, y, r: (r[3:5].isnan().byte() + 255) > r[3:5].isnan().byte(),
}


class Every(nn.Module):
    def forward(self, x, y, rows):
        return {name: case(x, y, rows) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def results():
    numbers = torch.tensor(NUMBERS)
    fresh = torch.randn(len(NUMBERS)) * 10
    x = torch.cat([numbers, fresh]).repeat_interleave(2 * len(NUMBERS))
    y = torch.cat([numbers, fresh]).repeat(2 * len(NUMBERS))
    inputs = (x.view(-1, 16), y.view(-1, 16), ROWS)
    compiled = sparsify.compile(Every(), inputs, cache=False, dynamic_shapes=None, strict=True)
    return compiled(*inputs), Every()(*inputs)


@pytest.mark.parametrize("name", CASES)
def test_special_numbers(results, name):
    got, expected = (part[name] for part in results)
    if isinstance(got, torch.Tensor):
        got, expected = (got,), (expected,)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
