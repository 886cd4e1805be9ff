"""Which kernels serve a layout, and that what they propose can be packed and built."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sparsify.codegen import registry
from sparsify.codegen.isa import AVX2, AVX512, AVX512_HALF_RATE, NEON, Isa
from sparsify.codegen.registry import (
    LinearSite,
    all_linear_kernels,
    linear_kernels,
    register_linear,
)
from sparsify.layouts import Csr, Dense, PackedDense, Sell, WeightStats

ISAS = [AVX512, AVX512_HALF_RATE, AVX2, NEON]
SHAPES = [(1, 1), (7, 300), (33, 17), (384, 384), (1000, 2048), (1536, 384), (30522, 384)]


def test_kernels_are_found_by_layout() -> None:
    for layout in (Sell(), Sell(4, 32, 16), PackedDense()):
        assert linear_kernels(layout).layout is type(layout)
    assert {kernels.layout for kernels in all_linear_kernels()} >= {Sell, PackedDense}


@pytest.mark.parametrize("layout", [Csr(), Dense()])
def test_a_layout_without_kernels_is_refused(layout: Any) -> None:
    with pytest.raises(LookupError, match=rf"'{layout.name}'; there are \['packed_dense', 'sell'"):
        linear_kernels(layout)


def test_a_layout_has_one_set_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = linear_kernels(Sell())
    register_linear(kernels)  # the same again does no harm

    @dataclass(frozen=True)
    class Others:
        layout = Sell

    with pytest.raises(ValueError, match="layout 'sell' already has kernels"):
        register_linear(Others())  # type: ignore[arg-type]
    assert linear_kernels(Sell()) is kernels


def test_a_new_layout_needs_only_to_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class CsrKernels:
        layout = Csr

    monkeypatch.setattr(registry, "_LINEAR", dict(registry._LINEAR))
    register_linear(CsrKernels())  # type: ignore[arg-type]
    assert type(linear_kernels(Csr())) is CsrKernels
    assert len(all_linear_kernels()) >= 3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_candidates_fit_and_have_a_kernel(isa: Isa, shape: tuple[int, int]) -> None:
    weight = torch.zeros(shape)
    weight[:, 0] = 1
    stats = WeightStats.of(weight)
    for kernels in all_linear_kernels():
        candidates = kernels.candidates(isa, shape, stats.nnz)
        assert candidates
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
    kernels = linear_kernels(layout)
    names = [kernels.kernel(AVX2, site, layout).name for site in sites]
    assert len(set(names)) == len(sites)
    assert names == [kernels.kernel(AVX2, site, layout).name for site in sites]
    assert kernels.kernel(AVX512, sites[0], layout).name not in names
