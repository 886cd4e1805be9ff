"""Softmax against float64, masked and degenerate rows included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsify.codegen.kernels.cpu.softmax import Softmax

FEATURES = (1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 1000)


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    return build([Softmax(width.isa)], width.target)


@pytest.fixture
def softmax(library: Any, width: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        return library(Softmax(width.isa), [x], x.shape, threads=(1, 2))

    return run


@pytest.mark.parametrize("features", FEATURES)
def test_every_size(softmax: Callable[..., torch.Tensor], features: int) -> None:
    for rows in (1, 2, 5):
        for scale in (1, 30):
            x = torch.randn(rows, features) * scale
            found = softmax(x)
            torch.testing.assert_close(found.double(), x.double().softmax(-1), atol=1e-7, rtol=4e-6)


@pytest.mark.parametrize("features", [5, 16, 37])
def test_masked_entries_are_exactly_zero(
    softmax: Callable[..., torch.Tensor], features: int
) -> None:
    x = torch.randn(8, features).masked_fill(torch.rand(8, features) < 0.5, float("-inf"))
    x[:, 0] = 1
    found = softmax(x)
    assert bool((found[x.isneginf()] == 0).all())
    torch.testing.assert_close(found.double(), x.double().softmax(-1), atol=1e-7, rtol=4e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 17])
def test_what_pytorch_calls_nan_is_nan(
    softmax: Callable[..., torch.Tensor], value: float, place: int
) -> None:
    x = torch.randn(3, 18)
    x[1, place] = value
    found = softmax(x)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_a_row_without_a_finite_entry_is_nan(softmax: Callable[..., torch.Tensor]) -> None:
    assert softmax(torch.full((2, 20), float("-inf"))).isnan().all()
