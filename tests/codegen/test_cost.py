"""Predicted times: they rise with work, fall with threads, and prefer what they should."""

import pytest

from sparsify.codegen.cost import CpuCostModel
from sparsify.codegen.target import Target, target_names
from sparsify.layouts import Layout, PackedDense, Sell

NAMES = [name for name in target_names() if name != "native"]
SHAPES = [(384, 384), (1536, 384), (384, 1536), (1000, 2048), (33, 17)]


@pytest.fixture(params=NAMES)
def cost(request: pytest.FixtureRequest) -> CpuCostModel:
    return CpuCostModel(Target.parse(request.param))


def best(cost: CpuCostModel, shape: tuple[int, int], sparsity: float, tokens: int) -> Layout:
    nnz = round((1 - sparsity) * shape[0] * shape[1])
    candidates = cost.candidates(shape, nnz)
    return min(candidates, key=lambda c: cost.linear_seconds(c, shape, nnz, tokens))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_is_a_candidate(cost: CpuCostModel, shape: tuple[int, int]) -> None:
    found = {type(layout) for layout in cost.candidates(shape, shape[0] * shape[1] // 5)}
    assert found >= {Sell, PackedDense}


@pytest.mark.parametrize("shape", SHAPES)
def test_time_rises_with_nonzeros_and_tokens(cost: CpuCostModel, shape: tuple[int, int]) -> None:
    elements = shape[0] * shape[1]
    for layout in cost.candidates(shape, elements // 5):
        by_nnz = [
            cost.linear_seconds(layout, shape, nnz, 128)
            for nnz in range(0, elements + 1, max(1, elements // 20))
        ]
        assert by_nnz == sorted(by_nnz)
        assert by_nnz[0] > 0
        by_tokens = [
            cost.linear_seconds(layout, shape, elements // 5, tokens)
            for tokens in (1, 2, 15, 16, 17, 32, 33, 48, 64, 100, 128, 512, 4096)
        ]
        assert by_tokens == sorted(by_tokens)
        assert by_tokens[-1] > by_tokens[0]


def test_sparse_time_follows_the_nonzeros(cost: CpuCostModel) -> None:
    shape = (1536, 1536)
    layout = next(c for c in cost.candidates(shape, 1) if isinstance(c, Sell))
    times = [cost.linear_seconds(layout, shape, n * 10_000, 512) for n in (20, 200)]
    assert 3 < times[1] / times[0] <= 10


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("tokens", [1, 16, 32, 128, 512])
def test_dense_weights_stay_dense_and_sparse_ones_do_not(
    cost: CpuCostModel, shape: tuple[int, int], tokens: int
) -> None:
    assert isinstance(best(cost, shape, 0.0, tokens), PackedDense)
    assert isinstance(best(cost, shape, 0.95, tokens), Sell)


def test_once_sparse_stays_sparse(cost: CpuCostModel) -> None:
    for shape in SHAPES:
        chosen = [isinstance(best(cost, shape, s / 20, 128), Sell) for s in range(20)]
        assert chosen == sorted(chosen)


def test_threads_divide_the_computation_and_not_the_memory() -> None:
    target = Target.parse("x86-avx2")
    one, two = CpuCostModel(target), CpuCostModel(target, threads=2)
    shape, layout = (4096, 4096), PackedDense(6)
    many = [m.linear_seconds(layout, shape, 4096**2, 4096) for m in (one, two)]
    assert many[0] / many[1] == pytest.approx(2)
    few = [m.linear_seconds(layout, shape, 4096**2, 1) for m in (one, two)]
    assert few[0] <= 2 * few[1]
    # 64 MB of weights take milliseconds to read, whatever the number of threads.
    assert few[1] >= 4 * 4096**2 / 60e9
