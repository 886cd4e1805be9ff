"""S-MBU and S-MFU against numbers worked out by hand."""

from dataclasses import replace

import pytest

from sparsify.ops import ExpertsShape
from sparsify.passes.utilisation import Utilisation

# An expert of 4 -> 10 -> 3 with a gate has 10 * (2 * 4 + 3) = 110 weights.
LAYER = Utilisation(
    ExpertsShape(count=8, out_features=3, hidden=10, in_features=4, gated=True),
    slots=2, tokens=6, active=5.0, seconds=1e-6, bytes_per_second=4e9, flops_per_second=8e9,
)  # fmt: skip


def test_active_experts_are_read_once_and_chosen_ones_are_multiplied() -> None:
    assert LAYER.weights == 110
    assert LAYER.bandwidth == pytest.approx(5 * 110 * 4 / 1e-6 / 4e9)
    assert LAYER.arithmetic == pytest.approx(6 * 2 * 110 * 2 / 1e-6 / 8e9)
    assert LAYER.text == "2 of 8 experts a token, 5.0 active at 6 tokens: S-MBU 0.55, S-MFU 0.33"


def test_without_a_gate_an_expert_has_one_matrix_less() -> None:
    assert replace(LAYER, shape=replace(LAYER.shape, gated=False)).weights == 70


def test_sparse_experts_count_what_is_stored_and_what_is_not_zero() -> None:
    sparse = replace(LAYER, nbytes=88.0, density=0.1)
    assert sparse.bandwidth == pytest.approx(LAYER.bandwidth * 88 / 440)
    assert sparse.arithmetic == pytest.approx(LAYER.arithmetic * 0.1)
