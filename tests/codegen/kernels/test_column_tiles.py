"""Narrow panels of columns against float64: every number of tokens, ragged panels and blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import AVX2, AVX512, NEON, Isa
from sparsify.codegen.kernels.cpu.column_tiles import ColumnTilesLinear
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.registry import LinearSite, linear_kernels
from sparsify.codegen.target import Target
from sparsify.layouts import DenseColumns
from sparsify.ops import sparse_linear

from .conftest import EPSILON, Width

TOKENS = (*range(1, 10), 16, 19)

# (out_features, in_features), the epilogue
CASES = [
    ((1, 1), Epilogue()),
    ((47, 7), Epilogue(True)),
    ((48, 128), Epilogue(True, "silu")),
    ((49, 127), Epilogue(True, "gelu", True)),
    ((130, 129), Epilogue()),
    ((96, 300), Epilogue(True, "relu", True)),
]

WIDTHS = {
    "avx512": (Width(AVX512, Target.parse("x86-avx512")), DenseColumns(48), 8),
    "avx2": (Width(AVX2, Target.parse("x86-avx2")), DenseColumns(16), 4),
    # ARM's template runs here as well, compiled for x86.
    "neon": (Width(NEON, Target.parse("x86-avx2")), DenseColumns(16), 3),
}


def tiles(isa: Isa, layout: DenseColumns, tokens: int, case: Any) -> ColumnTilesLinear:
    size, epilogue = case
    return ColumnTilesLinear(isa, *size, layout, epilogue, tokens)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("avx512", marks=pytest.mark.isa("x86-avx512")),
        pytest.param("avx2", marks=pytest.mark.isa("x86-avx2")),
        pytest.param("neon", marks=[pytest.mark.isa("x86-avx2"), pytest.mark.slow]),
    ],
)
def made(request: pytest.FixtureRequest, build: Callable[..., Any]) -> Any:
    """A kernel of each case, and their library."""
    width, layout, tokens = WIDTHS[request.param]
    kernels = [tiles(width.isa, layout, tokens, case) for case in CASES]
    return kernels, build(kernels, width.target)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_tiles_of_any_tokens(made: Any, number: int) -> None:
    kernel, library = made[0][number], made[1]
    (out, features), epilogue = CASES[number]
    for tokens in TOKENS:
        x, weight = torch.randn(tokens, features), torch.randn(out, features)
        bias = torch.randn(out) if epilogue.bias else None
        residual = torch.randn(tokens, out) if epilogue.residual else None
        inputs = [x, kernel.layout.pack(weight)["panels"], bias, residual]
        found = library(kernel, inputs, (tokens, out), threads=(1, 2))
        expected = sparse_linear.reference(
            x.double(), [weight.double()], "dense", out, features,
            None if bias is None else bias.double(), epilogue.activation,
            None if residual is None else residual.double(),
        )  # fmt: skip
        total = (x.double().abs() @ weight.double().abs().T + 4).clamp_min(1.0)
        assert bool(((found - expected).abs() <= 300 * EPSILON * total).all()), tokens


def test_narrow_panels_are_computed_in_registers_and_wide_ones_are_not() -> None:
    site = LinearSite(96, 40)
    for rows, narrow in ((48, True), (96, False)):
        layout = DenseColumns(rows)
        kernel = linear_kernels(layout, 8).kernel(AVX512, site, layout)
        assert isinstance(kernel, ColumnTilesLinear) == narrow


def test_weights_of_16_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="takes fp32 in panels of whole vectors of 16"):
        tiles(AVX512, DenseColumns(64, 16), 8, CASES[0])


def test_names_tell_kernels_apart() -> None:
    variants = [(isa, tokens) for isa in (AVX512, NEON) for tokens in (4, 8)]
    kernels = [tiles(isa, DenseColumns(48), n, case) for isa, n in variants for case in CASES]
    assert len({kernel.name for kernel in kernels}) == len(kernels)
