"""SELL with K blocks: groups, padding, and what damage is found."""

import pytest
import torch

from sparsify.layouts import LANES, Sell

LAYOUT = Sell(rows=4, k_block=4, window=4)
SHAPE = (6, 7)


def weight():
    matrix = torch.zeros(SHAPE)
    matrix[0, [0, 1, 2]] = torch.tensor([1.0, 2.0, 3.0])
    matrix[1, 6] = 4.0
    matrix[5, [3, 4]] = torch.tensor([5.0, 6.0])
    return matrix


def packed():
    return LAYOUT.pack(weight())


def columns_of(tensors):
    return torch.from_numpy(tensors["columns"].numpy().view("uint16").astype("int64")) // LANES


def test_tensors():
    """Two blocks of 4 columns, two groups of 4 rows: steps 3, 1, 1, 1."""
    found = packed()
    assert found["starts"].tolist() == [0, 3, 4, 5, 6]
    assert found["outputs"].tolist() == [1, 2, 3, 0, 4, 5, -1, -1, 0, 2, 3, 1, 4, 5, -1, -1]
    assert found["values"][:24].reshape(6, 4)[:, [1, 3]].tolist() == [
        [0, 1],
        [0, 2],
        [0, 3],
        [5, 0],
        [0, 4],
        [6, 0],
    ]
    assert columns_of(found).reshape(6, 4)[:, 3].tolist() == [0, 1, 2, 0, 2, 0]
    assert not found["values"][24:].any() and found["values"].numel() == 24 + 16


def test_sorting_saves_padding():
    """Every eighth row is long: sorted windows put the long rows together."""
    matrix = torch.zeros(64, 64)
    matrix[::8] = 1
    matrix[:, 0] = 1
    tight, loose = (Sell(8, 64, window).pack(matrix)["starts"][-1] for window in (64, 8))
    assert int(tight) == 64 + 7 and int(loose) == 8 * 64


def test_rows_longer_than_a_16_bit_offset_have_several_blocks():
    layout = Sell(rows=4, k_block=4096, window=4)
    matrix = torch.zeros(2, 9000)
    matrix[1, [0, 4095, 4096, 8999]] = 1
    found = layout.pack(matrix)
    layout.validate(found, (2, 9000))
    assert torch.equal(layout.unpack(found, (2, 9000)), matrix)


def replaced(name, index, value):
    tensors = packed()
    tensors[name] = tensors[name].clone()
    entries = tensors[name].view(torch.int16) if name == "columns" else tensors[name]
    entries[index] = value
    return tensors


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("starts", 0, 1, "must rise from 0"),
        ("starts", 2, 2, "must rise from 0"),
        ("starts", 4, 7, "28 slots, but 24 columns"),
        ("outputs", 0, 2, "not a permutation"),
        ("outputs", 0, 6, "not a permutation"),
        ("outputs", 15, 0, "not a permutation"),
        ("columns", 0, 3, "no multiple of 16"),
        ("columns", 0, 4 * LANES, "outside its block"),
        ("columns", 16, 3 * LANES, "outside its block"),
        ("columns", 5, -LANES, "outside its block"),
    ],
)
def test_damage(name, index, value, message):
    with pytest.raises(ValueError, match=message):
        LAYOUT.validate(replaced(name, index, value), SHAPE)


def test_a_missing_tail_is_refused():
    tensors = packed()
    tensors["values"] = tensors["values"][:-16]
    with pytest.raises(ValueError, match="24 columns and 8 values"):
        LAYOUT.validate(tensors, SHAPE)
