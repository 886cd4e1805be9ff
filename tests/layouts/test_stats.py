"""Weight statistics against their definitions, element by element."""

import pytest
import torch
from hypothesis import given, settings

from sparsify.layouts import WeightStats
from sparsify.layouts.stats import BLOCKS, PATTERNS

from .conftest import matrices


@settings(max_examples=40, deadline=None)
@given(weight=matrices())
def test_counts(weight):
    stats = WeightStats.of(weight)
    rows = weight.tolist()
    assert stats.shape == tuple(weight.shape)
    assert stats.nnz == sum(value != 0 for row in rows for value in row)
    assert stats.dead_rows == sum(not any(row) for row in rows)
    columns = list(zip(*rows, strict=True)) if rows else [()] * weight.shape[1]
    assert stats.dead_columns == sum(not any(column) for column in columns)


@settings(max_examples=40, deadline=None)
@given(weight=matrices())
def test_blocks_and_patterns(weight):
    stats = WeightStats.of(weight)
    height, width = weight.shape
    for rows, columns in BLOCKS:
        tiles = [
            bool(weight[r : r + rows, c : c + columns].any())
            for r in range(0, height, rows)
            for c in range(0, width, columns)
        ]
        expected = sum(tiles) / len(tiles) if tiles else 0.0
        assert stats.occupancy[rows, columns] == pytest.approx(expected, abs=1e-6)
    for kept, group in PATTERNS:
        groups = [
            int(weight[r, c : c + group].count_nonzero()) <= kept
            for r in range(height)
            for c in range(0, width, group)
        ]
        expected = sum(groups) / len(groups) if groups else 0.0
        assert stats.conformity[kept, group] == pytest.approx(expected, abs=1e-6)


def test_a_two_four_pattern_conforms():
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 3.0, 4.0]])
    stats = WeightStats.of(weight)
    assert stats.conformity[2, 4] == 1.0 and stats.conformity[1, 4] == 0.0
    assert stats.density == 0.5


def test_only_matrices_are_measured():
    with pytest.raises(ValueError, match=r"need a matrix, got shape \(2, 3, 4\)"):
        WeightStats.of(torch.zeros(2, 3, 4))
