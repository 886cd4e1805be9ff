"""Which kernels serve a layout, and that what they propose can be packed and built."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sparsify.codegen import registry
from sparsify.codegen.isa import AVX2, AVX512, AVX512_HALF_RATE, AVX512_ZEN5, NEON, Isa
from sparsify.codegen.registry import (
    LinearSite,
    SkippingKernels,
    all_linear_kernels,
    linear_kernels,
    register_linear,
)
from sparsify.layouts import Bitmap, Csr, Dense, PackedDense, Sell, WeightStats

ISAS = [AVX512, AVX512_ZEN5, AVX512_HALF_RATE, AVX2, NEON]
SHAPES = [(1, 1), (7, 300), (33, 17), (384, 384), (1000, 2048), (1536, 384), (30522, 384)]


def test_kernels_are_found_by_layout() -> None:
    for layout in (Sell(), Sell(4, 32, 16), PackedDense()):
        for tokens in (1, 128):
            assert linear_kernels(layout, tokens).layout is type(layout)
    assert {kernels.layout for kernels in all_linear_kernels()} >= {Sell, PackedDense}


def test_a_layout_without_kernels_is_refused() -> None:
    known = r"'csr'; there are \['bitmap', 'dense', 'dense_columns', 'packed_dense', 'sell'"
    with pytest.raises(LookupError, match=known):
        linear_kernels(Csr(), 128)


def test_few_tokens_have_kernels_of_their_own() -> None:
    for layout in (Bitmap(), Dense(), PackedDense(), Sell()):
        assert linear_kernels(layout, 1).form == "rows"
    assert linear_kernels(Sell(), 9).form == linear_kernels(PackedDense(), 9).form == "lanes"
    assert linear_kernels(Bitmap(), 128).form == "rows"  # it has no others


def test_a_layout_has_one_set_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = linear_kernels(Sell(), 128)
    register_linear(kernels)  # the same again does no harm

    @dataclass(frozen=True)
    class Others:
        layout = Sell
        form = "lanes"

    with pytest.raises(ValueError, match="layout 'sell' already has kernels for lanes"):
        register_linear(Others())  # type: ignore[arg-type]
    assert linear_kernels(Sell(), 128) is kernels


def test_a_new_layout_needs_only_to_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class CsrKernels:
        layout = Csr
        form = "lanes"

    monkeypatch.setattr(registry, "_LINEAR", dict(registry._LINEAR))
    register_linear(CsrKernels())  # type: ignore[arg-type]
    assert type(linear_kernels(Csr(), 128)) is CsrKernels
    assert len(all_linear_kernels()) >= 3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_candidates_fit_and_have_a_kernel(isa: Isa, shape: tuple[int, int]) -> None:
    weight = torch.zeros(shape)
    weight[:, 0] = 1
    stats = WeightStats.of(weight)
    for kernels in all_linear_kernels():
        candidates = kernels.candidates(isa, shape, stats.nnz)
        if isinstance(kernels, SkippingKernels):
            candidates += kernels.skipping_candidates(isa, shape)
        # Those that serve a layout which others choose offer none of their own.
        candidates = candidates or (kernels.layout(),)
        for layout in candidates:
            assert isinstance(layout, kernels.layout)
            assert layout.fits(stats) is None
            kernel = kernels.kernel(isa, LinearSite(*shape, bias=True), layout)
            assert f"{shape[0]}x{shape[1]}" in kernel.name
            assert isa.name in kernel.name


@pytest.mark.parametrize("layout", [Sell(8, 32, 16), PackedDense(6)])
def test_equal_sites_have_equal_names_and_others_other_names(layout: Any) -> None:
    sites = [
        LinearSite(32, 16),
        LinearSite(32, 17),
        LinearSite(33, 16),
        LinearSite(32, 16, bias=True),
        LinearSite(32, 16, activation="gelu"),
        LinearSite(32, 16, residual=True),
    ]
    kernels = linear_kernels(layout, 128)
    names = [kernels.kernel(AVX2, site, layout).name for site in sites]
    assert len(set(names)) == len(sites)
    assert names == [kernels.kernel(AVX2, site, layout).name for site in sites]
    assert kernels.kernel(AVX512, sites[0], layout).name not in names
