"""Bitmaps: the order of bits and values, what 16-bit values take, and what damage is found."""

import pytest
import torch

from sparsify.layouts import Bitmap, WeightStats
from sparsify.layouts.stats import exact_in_bfloat16

SHAPE = (3, 35)


def weight():
    matrix = torch.zeros(SHAPE)
    matrix[0, [0, 17]] = torch.tensor([1.0, 2.0])
    matrix[1, [15, 34]] = torch.tensor([3.0, 4.0])
    matrix[2, [1, 16]] = torch.tensor([5.0, 6.0])
    matrix[0, 3] = -0.0
    return matrix


def test_tensors():
    """Groups of two rows, three words of 16 columns each."""
    found = Bitmap(rows=2).pack(weight())
    assert found["starts"].tolist() == [0, 4, 6]
    assert found["masks"][0].tolist() == [[1, -(1 << 15)], [2, 0], [0, 4]]
    assert found["masks"][1].tolist() == [[2, 0], [1, 0], [0, 0]]
    assert found["values"].tolist() == [1, 3, 2, 4, 5, 6] + [0] * 32


def test_tensors_of_halves():
    """Words of 32 columns, those 16 apart side by side; values are the upper halves."""
    found = Bitmap(rows=2, value_bits=16).pack(weight())
    assert found["masks"][0].tolist() == [[1 | 1 << 3, 1 << 30], [0, 1 << 4]]
    assert found["masks"][1].tolist() == [[1 << 1 | 1 << 2, 0], [0, 0]]
    values = found["values"].view(torch.bfloat16)
    assert values.tolist() == [1, 2, 3, 4, 6, 5] + [0] * 32


def test_halves_take_only_what_is_exact():
    layout = Bitmap(value_bits=16)
    inexact = torch.tensor([[1.0, 1.0 + 2.0**-8]])
    assert not exact_in_bfloat16(inexact) and exact_in_bfloat16(inexact.bfloat16().float())
    with pytest.raises(ValueError, match="not all values are exact in bfloat16"):
        layout.pack(inexact)
    assert "RoundWeights" in (layout.fits(WeightStats.of(inexact)) or "")
    assert layout.fits(WeightStats.of(inexact.bfloat16().float())) is None
    assert Bitmap().fits(WeightStats.of(inexact)) is None
    assert not exact_in_bfloat16(torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("starts", 0, 1, "must rise from 0"),
        ("starts", 1, 5, "does not follow from the bits"),
        ("masks", (0, 0, 0), 0, "does not follow from the bits"),
        ("masks", (0, 0, 1), -1, "does not follow from the bits"),
    ],
)
def test_damage(bits, name, index, value, message):
    layout = Bitmap(rows=2, value_bits=bits)
    damaged = layout.pack(weight())
    damaged[name][index] = value
    with pytest.raises(ValueError, match=message):
        layout.validate(damaged, SHAPE)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("shape", [(3, 34), (3, 33)])
def test_bits_outside_the_weight_are_refused(bits, shape):
    layout = Bitmap(rows=2, value_bits=bits)
    with pytest.raises(ValueError, match="lies outside the weight"):
        layout.validate(layout.pack(weight()), shape)


def test_bits_of_rows_past_the_last_are_refused():
    layout = Bitmap(rows=4)
    with pytest.raises(ValueError, match="lies outside the weight"):
        layout.validate(layout.pack(weight()), (2, 35))


def test_missing_tail_is_refused():
    layout = Bitmap()
    damaged = layout.pack(weight())
    damaged["values"] = damaged["values"][:-1]
    with pytest.raises(ValueError, match="6 bits are set"):
        layout.validate(damaged, SHAPE)
