"""Linear kernels for few tokens against float64: layouts, sizes, epilogues, threads."""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, product
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import AVX2, AVX512, NEON, Isa
from sparsify.codegen.kernels.cpu.bitmap import BitmapLinear
from sparsify.codegen.kernels.cpu.dense_rows import DenseRowsLinear
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.panel_rows import PanelRowsLinear
from sparsify.codegen.kernels.cpu.sell_rows import SellRowsLinear
from sparsify.codegen.registry import LinearSite, all_linear_kernels
from sparsify.codegen.target import Target
from sparsify.layouts import Bitmap, Dense, PackedDense, Sell
from sparsify.ops import ACTIVATIONS

from .conftest import Width

TOKENS = (1, 2, 3, 4, 5, 8, 9, 17)

# (out_features, in_features)
SIZES = [(1, 1), (7, 5), (8, 16), (9, 33), (15, 31), (16, 8), (17, 9), (31, 15), (32, 32), (33, 17)]

# Every combination without an activation, and every activation with all else.
EPILOGUES = [
    Epilogue(bias, activation, residual)
    for activation, bias, residual in product(ACTIVATIONS, (False, True), (False, True))
    if (bias and residual) or activation == "none"
]

WIDTHS = {
    "avx512": Width(AVX512, Target.parse("x86-avx512")),
    "avx2": Width(AVX2, Target.parse("x86-avx2")),
}

# A layout, and what else tells its kernels apart.
KINDS: list[tuple[Any, tuple[int, ...]]] = [
    *((Bitmap(rows, bits), (4,)) for rows, bits in product((1, 4, 16), (32, 16))),
    (Bitmap(2, 32), (8,)),
    (Dense(), (4, 4)),
    (Dense(), (1, 8)),
    (PackedDense(6), (2, 4)),
    (PackedDense(1), (1, 2)),
    (PackedDense(5), (3, 1)),
    (PackedDense(16), (2, 2)),
    (Sell(8, 192, 64), ()),
    (Sell(4, 7, 4), ()),
    (Sell(12, 64, 24), ()),
    (Sell(16, 4096, 32), ()),
    (Sell(32, 16, 32), ()),
]

LINEARS = {
    Bitmap: BitmapLinear,
    Dense: DenseRowsLinear,
    PackedDense: PanelRowsLinear,
    Sell: SellRowsLinear,
}


def made(isa: Isa, kind: tuple[Any, tuple[int, ...]], size: tuple[int, int], e: Epilogue) -> Any:
    layout, options = kind
    return LINEARS[type(layout)](isa, *size, layout, e, *options)


# Each kind meets two epilogues and sizes, each epilogue and size several kinds.
CASES = [
    (kind, size, epilogue)
    for kind, size, epilogue in zip([*KINDS, *KINDS], cycle(SIZES), cycle(EPILOGUES), strict=False)
]

LARGE = [(kind, (130, 200), Epilogue(bias=True)) for kind in KINDS]

CHOSEN = LinearSite(100, 300, True, "gelu", True)


def chosen(isa: Isa) -> list[Any]:
    """The kernels that a compilation may pick."""
    shape = (CHOSEN.out_features, CHOSEN.in_features)
    return [
        kernels.kernel(isa, CHOSEN, layout)
        for kernels in all_linear_kernels()
        if kernels.form == "rows"
        for layout in kernels.candidates(isa, shape, 10_000)
    ]


def weight_for(kernel: Any, density: float) -> torch.Tensor:
    size = kernel.out_features, kernel.in_features
    weight = torch.randn(size) * (torch.rand(size) < density)
    weight[torch.rand(size[0]) < 0.1] = 0
    return weight.bfloat16().float() if getattr(kernel.layout, "value_bits", 32) == 16 else weight


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.isa(f"x86-{name}")) for name in WIDTHS],
)
def width(request: pytest.FixtureRequest) -> Width:
    return WIDTHS[request.param]


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    kernels = [made(width.isa, *case) for case in CASES + LARGE] + chosen(width.isa)
    return build(kernels, width.target)


@pytest.mark.parametrize(("kind", "size", "epilogue"), CASES)
def test_every_layout_size_and_epilogue(
    library: Any, width: Any, check_rows: Any, kind: Any, size: Any, epilogue: Epilogue
) -> None:
    kernel = made(width.isa, kind, size, epilogue)
    for tokens in TOKENS:
        check_rows(library, kernel, weight_for(kernel, 0.4), tokens)


@pytest.mark.parametrize(("kind", "size", "epilogue"), LARGE)
def test_density_and_threads(
    library: Any, width: Any, check_rows: Any, kind: Any, size: Any, epilogue: Epilogue
) -> None:
    kernel = made(width.isa, kind, size, epilogue)
    for density in (0.0, 0.05, 0.5, 1.0):
        check_rows(library, kernel, weight_for(kernel, density), 3, threads=(1, 2, 3))


def test_what_the_registry_chooses(library: Any, width: Any, check_rows: Any) -> None:
    for kernel in chosen(width.isa):
        for tokens in TOKENS:
            check_rows(library, kernel, weight_for(kernel, 0.3), tokens, threads=(1, 2))


@pytest.mark.isa("avx512vbmi2")
def test_halves_are_expanded_at_once(build: Callable[..., Any], check_rows: Any) -> None:
    isa, target = replace(AVX512, vbmi2=True), Target.parse("native")
    sizes = [(1, 1), (9, 31), (33, 70), (40, 128)]
    kernels = [made(isa, (Bitmap(4, 16), (4,)), size, Epilogue(True)) for size in sizes]
    library = build(kernels, target)
    for kernel, tokens in product(kernels, TOKENS):
        check_rows(library, kernel, weight_for(kernel, 0.4), tokens)


def test_names_tell_kernels_apart() -> None:
    kernels = [made(isa, *case) for isa in (AVX512, NEON) for case in CASES]
    assert len({kernel.name for kernel in kernels}) == len(kernels)


def test_neon_looks_bits_up_and_multiplies_vectors(assembly_for_neon: Callable[..., str]) -> None:
    kernels = [made(NEON, kind, (33, 70), Epilogue(True, "silu", True)) for kind in KINDS[::4]]
    assembly = assembly_for_neon(kernels)
    assert "fmla\tv" in assembly and "tbl\tv" in assembly
