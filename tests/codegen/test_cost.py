"""Predicted times: they rise with work, fall with threads, and prefer what they should."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from sparsify.codegen.cost import CpuCostModel
from sparsify.codegen.isa import AVX512_HALF_RATE
from sparsify.codegen.registry import linear_kernels
from sparsify.codegen.target import Target, target_names
from sparsify.frontend.torch import import_torch
from sparsify.layouts import (
    Bitmap,
    Dense,
    DenseColumns,
    Layout,
    PackedDense,
    Sell,
    WeightStats,
    form_of,
)
from sparsify.passes import PORTABLE, run_pipeline

NAMES = [name for name in target_names() if name != "native"]
SHAPES = [(384, 384), (1536, 384), (384, 1536), (1000, 2048), (33, 17)]


@pytest.fixture(params=NAMES)
def cost(request: pytest.FixtureRequest) -> CpuCostModel:
    return CpuCostModel(Target.parse(request.param))


def best(cost: CpuCostModel, shape: tuple[int, int], sparsity: float, tokens: int) -> Layout:
    nnz = round((1 - sparsity) * shape[0] * shape[1])
    stats = WeightStats(shape, nnz)
    candidates = [c for c in cost.candidates(shape, nnz, tokens) if c.fits(stats) is None]
    return min(candidates, key=lambda c: cost.linear_seconds(c, shape, nnz, tokens))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_is_a_candidate(cost: CpuCostModel, shape: tuple[int, int]) -> None:
    nnz = shape[0] * shape[1] // 5
    many, few = (
        {type(layout) for layout in cost.candidates(shape, nnz, tokens)} for tokens in (128, 1)
    )
    expands = bool(
        cost.target.isa.byte_shuffle
    )  # bits to masks, which a bitmap's kernel begins with
    assert many >= {Sell, PackedDense} and few >= {Sell, Dense, PackedDense}
    assert (Bitmap in few) == expands


@pytest.mark.parametrize("tokens", [1, 8, 9, 128])
def test_only_layouts_whose_kernels_need_no_conversion_are_candidates(
    cost: CpuCostModel, tokens: int
) -> None:
    for layout in cost.candidates((384, 384), 30_000, tokens):
        assert linear_kernels(layout, tokens).form == form_of(tokens)


@pytest.mark.parametrize("shape", SHAPES)
def test_time_rises_with_nonzeros_and_tokens(cost: CpuCostModel, shape: tuple[int, int]) -> None:
    elements = shape[0] * shape[1]
    for layout in cost.candidates(shape, elements // 5, 128):
        by_nnz = [
            cost.linear_seconds(layout, shape, nnz, 128)
            for nnz in range(0, elements + 1, max(1, elements // 20))
        ]
        assert by_nnz == sorted(by_nnz)
        assert by_nnz[0] > 0
        # Few tokens and many have kernels of their own, whose times do not meet at the border.
        for counts in ((1, 2, 3, 5, 8), (9, 15, 16, 17, 32, 33, 48, 64, 100, 128, 512, 4096)):
            by_tokens = [
                cost.linear_seconds(layout, shape, elements // 5, tokens) for tokens in counts
            ]
            assert by_tokens == sorted(by_tokens)
        assert by_tokens[-1] > by_tokens[0]


def test_sparse_time_follows_the_nonzeros(cost: CpuCostModel) -> None:
    shape = (1536, 1536)
    layout = next(c for c in cost.candidates(shape, 1, 512) if isinstance(c, Sell))
    times = [cost.linear_seconds(layout, shape, n * 10_000, 512) for n in (20, 200)]
    assert 3 < times[1] / times[0] <= 10


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("tokens", [16, 32, 128, 512])
def test_dense_weights_stay_dense_and_sparse_ones_do_not(
    cost: CpuCostModel, shape: tuple[int, int], tokens: int
) -> None:
    assert isinstance(best(cost, shape, 0.0, tokens), PackedDense)
    assert isinstance(best(cost, shape, 0.95, tokens), Sell)


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_few_tokens_go_from_dense_by_way_of_bitmaps_to_sell(
    cost: CpuCostModel, shape: tuple[int, int], tokens: int
) -> None:
    order = [(Dense, DenseColumns, PackedDense), (Bitmap,), (Sell,)]
    found = [best(cost, shape, percent / 100, tokens) for percent in range(0, 100, 5)]
    ranks = [next(i for i, kinds in enumerate(order) if isinstance(x, kinds)) for x in found]
    assert ranks == sorted(ranks)
    assert ranks[0] == 0 and ranks[-1] == 2


def test_half_the_weights_are_worth_a_bitmap_where_memory_is_the_limit() -> None:
    for name in ("x86-avx512", "x86-avx2"):
        assert isinstance(best(CpuCostModel(Target.parse(name)), (4096, 4096), 0.5, 1), Bitmap)


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


def test_threads_without_a_task_do_not_help() -> None:
    target = Target.parse("x86-avx512")
    shape, nnz, layout = (768, 768), 768 * 77, Sell(4, 128, 768)
    one, two, many = (
        CpuCostModel(target, threads).linear_seconds(layout, shape, nnz, 128)
        for threads in (1, 2, 64)
    )
    assert two == pytest.approx(one / 2)  # two token tiles
    assert many == two


def test_many_threads_get_many_tasks() -> None:
    target, shape = Target.parse("x86-avx512"), (768, 768)
    chosen = best(CpuCostModel(target, threads=8), shape, 0.8, 128)
    assert linear_kernels(chosen, 128).tasks(target.isa, chosen, shape, 128) >= 8


@pytest.mark.parametrize(("width", "resident"), [(512, True), (4096, False)])
def test_weights_that_fit_a_cache_are_not_read_from_memory(width: int, resident: bool) -> None:
    target = replace(Target.parse("x86-avx512"), isa=AVX512_HALF_RATE)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(2))).eval()
    imported = import_torch(model, (torch.ones(2, width),), dynamic_shapes=None)
    portable = run_pipeline(imported, PORTABLE).programs
    cost = CpuCostModel.of(target, 1, portable)
    assert cost.resident == resident
    # 64 B of dense weights are more than the bits and half of the values from memory alone.
    assert isinstance(best(cost, (width, width), 0.5, 2), Bitmap) != resident


def test_a_cache_makes_no_layout_slower(cost: CpuCostModel) -> None:
    near = replace(cost, resident=True)
    for shape, tokens in product(SHAPES, (1, 2, 8, 128)):
        for layout in cost.candidates(shape, shape[0] * shape[1] // 4, tokens):
            times = (
                model.linear_seconds(layout, shape, shape[0] * shape[1] // 4, tokens)
                for model in (near, cost)
            )
            assert next(times) <= next(times)
