"""Compressed sparse rows: what is stored, and what damage is found."""

import pytest
import torch

from sparsify.layouts import Csr

WEIGHT = torch.tensor([[0.0, 2.0, 0.0, 3.0], [0.0, -0.0, 0.0, 0.0], [5.0, 0.0, 7.0, 0.0]])


def packed():
    return Csr().pack(WEIGHT)


def test_tensors():
    found = packed()
    assert found["values"].tolist() == [2, 3, 5, 7]
    assert found["columns"].tolist() == [1, 3, 0, 2]
    assert found["offsets"].tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize(("columns", "dtype"), [(32767, torch.int16), (32768, torch.int32)])
def test_columns_are_as_narrow_as_the_row_allows(columns, dtype):
    weight = torch.zeros(2, columns)
    weight[1, -1] = 1
    found = Csr().pack(weight)
    assert found["columns"].dtype == dtype
    Csr().validate(found, (2, columns))
    assert torch.equal(Csr().unpack(found, (2, columns)), weight)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("offsets", [0, 2, 4], "3 entries for 3 rows"),
        ("offsets", [1, 2, 2, 4], "must start at 0"),
        ("offsets", [0, 3, 2, 4], "never decrease"),
        ("offsets", [0, 2, 2, 5], "offsets end at 5"),
        ("columns", [1, 4, 0, 2], "outside 0..3"),
        ("columns", [-1, 3, 0, 2], "outside 0..3"),
        ("columns", [3, 1, 0, 2], "must ascend"),
        ("columns", [1, 3, 2, 2], "without repetition"),
    ],
)
def test_damage(name, values, message):
    damaged = packed()
    damaged[name] = torch.tensor(values, dtype=damaged[name].dtype)
    with pytest.raises(ValueError, match=message):
        Csr().validate(damaged, (3, 4))


def test_matrices_instead_of_vectors_are_refused():
    damaged = {**packed(), "values": packed()["values"][None]}
    with pytest.raises(ValueError, match="one dimension"):
        Csr().validate(damaged, (3, 4))
