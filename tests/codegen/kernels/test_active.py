"""Kernels that skip zeros against float64: sizes, shares, zeros of both signs, threads."""

from collections.abc import Callable
from itertools import cycle, product
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import AVX2, AVX512, NEON, Isa
from sparsify.codegen.kernels.cpu.column_rows import ColumnsLinear
from sparsify.codegen.kernels.cpu.dense_in_place import InPlaceLinear
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.gated_rows import GatedRowsLinear
from sparsify.codegen.registry import LinearSite, all_linear_kernels, skipping_kernels
from sparsify.codegen.target import Target
from sparsify.layouts import Dense, DenseColumns
from sparsify.ops import active_linear, gated_linear

from .conftest import EPSILON, Width

TOKENS = (1, 3, 7, 8, 16)
SHARES = (0.0, 0.1, 0.5, 1.0)

# (out_features, in_features)
SIZES = [(1, 1), (7, 9), (31, 33), (32, 32), (33, 7), (200, 70)]

LAYOUTS = [DenseColumns(32), DenseColumns(64, 16), DenseColumns(96)]
EPILOGUES = [Epilogue(), Epilogue(True), Epilogue(True, "silu"), Epilogue(True, "gelu", True)]

WIDTHS = {
    "avx512": Width(AVX512, Target.parse("x86-avx512")),
    "avx2": Width(AVX2, Target.parse("x86-avx2")),
    # ARM's template runs here as well, compiled for x86.
    "neon": Width(NEON, Target.parse("x86-avx2")),
}

COLUMNS = list(zip(SIZES, cycle(LAYOUTS), cycle(EPILOGUES), (1, 4, 2, 8, 4, 8), strict=False))
GATED = list(zip(SIZES[2:], cycle((False, True)), (1, 4, 8, 8), (8, 2, 4, 4), strict=False))
IN_PLACE = list(zip(SIZES, cycle([Dense(), *LAYOUTS]), cycle(EPILOGUES), strict=False))


def columns(isa: Isa, size: Any, layout: Any, epilogue: Epilogue, tokens: int) -> ColumnsLinear:
    return ColumnsLinear(isa, *size, layout, epilogue, tokens)


def gated(isa: Isa, size: Any, bias: bool, rows: int, tokens: int) -> GatedRowsLinear:
    return GatedRowsLinear(isa, *size, Dense(), bias, rows, tokens)


def in_place(isa: Isa, size: Any, layout: Any, epilogue: Epilogue) -> InPlaceLinear:
    return InPlaceLinear(isa, *size, layout, epilogue, 2, 3, max(1, -(-size[1] // 2)))


def some_zeros(tokens: int, features: int, share: float) -> torch.Tensor:
    """Zeros of both signs; a feature is zero in all tokens, or in some alone."""
    kept = (torch.rand(1, features) < share) & (torch.rand(tokens, features) < 0.8)
    signs = torch.where(torch.rand(tokens, features) < 0.5, -0.0, 0.0)
    return torch.where(kept, torch.randn(tokens, features), signs)


def weight_of(size: tuple[int, int], layout: Any) -> torch.Tensor:
    weight = torch.randn(size)
    return weight.bfloat16().float() if getattr(layout, "value_bits", 32) == 16 else weight


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("avx512", marks=pytest.mark.isa("x86-avx512")),
        pytest.param("avx2", marks=pytest.mark.isa("x86-avx2")),
        pytest.param("neon", marks=pytest.mark.isa("x86-avx2")),
    ],
)
def width(request: pytest.FixtureRequest) -> Width:
    return WIDTHS[request.param]


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    kernels = [columns(width.isa, *case) for case in COLUMNS]
    kernels += [gated(width.isa, *case) for case in GATED]
    kernels += [in_place(width.isa, *case) for case in IN_PLACE]
    return build(kernels, width.target)


def within_rounding(found: torch.Tensor, expected: torch.Tensor, total: torch.Tensor) -> bool:
    """``total`` is the sum of the magnitudes that were added, with room for an activation's."""
    return bool(((found - expected).abs() <= 300 * EPSILON * total.clamp_min(1.0)).all())


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_of_active_inputs(library: Any, width: Any, case: Any) -> None:
    kernel = columns(width.isa, *case)
    (out, features), layout, epilogue, _ = case
    for tokens, share in product(TOKENS, SHARES):
        x, weight = some_zeros(tokens, features, share), weight_of((out, features), layout)
        bias = torch.randn(out) if epilogue.bias else None
        residual = torch.randn(tokens, out) if epilogue.residual else None
        inputs = [x, layout.pack(weight)["panels"], bias, residual]
        found = library(kernel, inputs, (tokens, out), threads=(1, 2))
        expected = active_linear.reference(
            x.double(), [weight.double()], "dense", out, features, share,
            None if bias is None else bias.double(), epilogue.activation,
            None if residual is None else residual.double(),
        )  # fmt: skip
        total = x.double().abs() @ weight.double().abs().T + 4
        assert within_rounding(found, expected, total), (kernel.name, tokens, share)


@pytest.mark.parametrize("case", GATED)
def test_rows_under_an_open_gate(library: Any, width: Any, case: Any) -> None:
    kernel = gated(width.isa, *case)
    (out, features), has_bias, _, _ = case
    for tokens, share in product(TOKENS, SHARES):
        x, weight = torch.randn(tokens, features), torch.randn(out, features)
        gate, bias = some_zeros(tokens, out, share), torch.randn(out) if has_bias else None
        found = library(kernel, [x, gate, weight, bias], (tokens, out), threads=(1, 2, 3))
        expected = gated_linear.reference(
            x.double(), gate.double(), [weight.double()], "dense", out, features, share,
            None if bias is None else bias.double(),
        )  # fmt: skip
        total = gate.double().abs() * (x.double().abs() @ weight.double().abs().T + 4)
        assert within_rounding(found, expected, total), (kernel.name, tokens, share)
        assert not found[gate == 0].any()


def test_what_is_skipped_is_not_read(library: Any, width: Any) -> None:
    """Weights of features that are zero may be anything."""
    kernel = columns(width.isa, *COLUMNS[5])
    out, features = COLUMNS[5][0]
    x, weight = torch.randn(2, features), torch.randn(out, features).bfloat16().float()
    x[:, ::3] = 0
    poisoned = weight.clone()
    poisoned[:, ::3] = torch.inf
    rest = [torch.zeros(out)] * kernel.epilogue.bias
    rest += [torch.zeros(2, out)] * kernel.epilogue.residual
    clean, dirty = (
        library(kernel, [x, kernel.layout.pack(w)["panels"], *rest], (2, out))
        for w in (weight, poisoned)
    )
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("case", IN_PLACE)
def test_lanes_read_the_weight_in_place(
    library: Any, width: Any, check_linear: Any, case: Any
) -> None:
    for tokens in (1, 15, 16, 17, 33, 64, 100):
        weight = weight_of(case[0], case[1])
        check_linear(library, in_place(width.isa, *case), weight, tokens, threads=(1, 2))


def test_what_a_compilation_may_pick_skips(build: Callable[..., Any]) -> None:
    target = Target.parse("native")
    site = LinearSite(130, 90)
    shape = (site.out_features, site.in_features)
    kernels = {
        kernels.skipping_kernel(target.isa, site, layout): layout
        for side in ("inputs", "outputs")
        for found in all_linear_kernels()
        if found.form == "rows" and (kernels := skipping_kernels(found.layout(), side)) is not None
        for layout in kernels.skipping_candidates(target.isa, shape)
    }
    assert {type(layout) for layout in kernels.values()} == {Dense, DenseColumns}
    library = build(kernels, target)
    weight = torch.randn(shape).bfloat16().float()
    for kernel, layout in kernels.items():
        x, gate = some_zeros(3, 90, 0.3), some_zeros(3, 130, 0.3)
        under = isinstance(kernel, GatedRowsLinear)
        inputs = [x, *([gate] if under else []), *layout.pack(weight).values()]
        y = x.double() @ weight.double().T
        found = library(kernel, inputs, (3, 130))
        torch.testing.assert_close(found.double(), gate * y if under else y, atol=1e-4, rtol=1e-4)


def test_names_tell_kernels_apart() -> None:
    made = [columns(isa, *case) for isa in (AVX512, NEON) for case in COLUMNS]
    made += [gated(isa, *case) for isa in (AVX512, NEON) for case in GATED]
    made += [in_place(isa, *case) for isa in (AVX512, NEON) for case in IN_PLACE]
    assert len({kernel.name for kernel in made}) == len(made)
