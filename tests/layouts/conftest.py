"""Weights that are hard to store: odd sizes, empty rows, zeros of both signs, denormals."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from sparsify.layouts import Bitmap, Csr, Dense, DenseColumns, Layout, PackedDense, Sell

LAYOUTS = [
    Bitmap(),
    Bitmap(rows=1),
    Bitmap(rows=16),
    Bitmap(rows=2, value_bits=16),
    Bitmap(rows=8, value_bits=16),
    Csr(),
    Dense(),
    DenseColumns(),
    DenseColumns(rows=32),
    DenseColumns(rows=64, value_bits=16),
    PackedDense(),
    PackedDense(rows=1),
    PackedDense(rows=16),
    Sell(),
    Sell(rows=4, k_block=1, window=4),
    Sell(rows=8, k_block=5, window=16),
    Sell(rows=16, k_block=4096, window=64),
]

_SPECIAL = [0.0, -0.0, 1.0, -1.5, 1e-45, -1e-40, 3.4e38, float("inf"), float("-inf")]


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.spec)
def layout(request):
    return request.param


def storable(layout: Layout, weight: torch.Tensor) -> torch.Tensor:
    """The weight, in bfloat16's precision for layouts that keep no more."""
    if getattr(layout, "value_bits", 32) == 16:
        return weight.bfloat16().float()
    return weight


@st.composite
def matrices(draw) -> torch.Tensor:
    """A matrix of up to 40 x 40 whose density, empty rows and empty columns vary."""
    rows, columns = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = generator.standard_normal((rows, columns)).astype(np.float32)
    special = generator.choice(np.array(_SPECIAL, np.float32), (rows, columns))
    weight = np.where(generator.random((rows, columns)) < 0.2, special, weight)
    weight[generator.random((rows, columns)) >= density] = 0
    weight[generator.random(rows) < draw(st.sampled_from([0.0, 0.5]))] = 0
    weight[:, generator.random(columns) < draw(st.sampled_from([0.0, 0.5]))] = 0
    return torch.from_numpy(weight)
