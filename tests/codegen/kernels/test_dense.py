"""The dense linear kernel against float64: sizes, tiles, epilogues, threads."""

from collections.abc import Callable
from itertools import cycle, product
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import AVX2, AVX512, NEON, Isa
from sparsify.codegen.kernels.cpu.dense import DenseLinear
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.registry import LinearSite, linear_kernels
from sparsify.layouts import PackedDense
from sparsify.ops import ACTIVATIONS

TOKENS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100)

# (out_features, in_features)
SIZES = [(1, 1), (7, 5), (8, 16), (9, 33), (15, 31), (16, 8), (17, 9), (31, 15), (32, 32), (33, 17)]

# Every combination without an activation, and every activation with all else.
EPILOGUES = [
    Epilogue(bias, activation, residual)
    for activation, bias, residual in product(ACTIVATIONS, (False, True), (False, True))
    if (bias and residual) or activation == "none"
]
SITES = list(zip(EPILOGUES, cycle(SIZES), strict=False))

# (out_features, in_features, rows, vectors, panels of a task, k_block)
TILES = [
    (36, 100, 6, 4, 2, 32),  # whole panels, four K blocks
    (65, 100, 6, 2, 4, 33),  # ragged last panel, ragged last K block, ragged last task
    (33, 257, 8, 2, 1, 64),
    (130, 40, 12, 1, 11, 40),
    (5, 130, 6, 4, 1, 7),  # fewer rows than a panel
]

CHOSEN = [LinearSite(65, 400, True, "relu", True)]


def with_epilogue(isa: Isa, epilogue: Epilogue, size: tuple[int, int]) -> DenseLinear:
    return DenseLinear(isa, *size, PackedDense(4), epilogue, 1, 3, max(1, -(-size[1] // 2)))


def with_tiles(isa: Isa, tiles: tuple[int, ...]) -> DenseLinear:
    out_features, in_features, rows, vectors, panels, k_block = tiles
    epilogue = Epilogue(bias=True, residual=True)
    layout = PackedDense(rows)
    return DenseLinear(isa, out_features, in_features, layout, epilogue, vectors, panels, k_block)


def chosen(isa: Isa, site: LinearSite) -> Any:
    """The kernel that a compilation would pick."""
    kernels = linear_kernels(PackedDense(), 128)
    shape = (site.out_features, site.in_features)
    (layout, *_) = kernels.candidates(isa, shape, shape[0] * shape[1])
    return kernels.kernel(isa, site, layout)


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    kernels = [with_epilogue(width.isa, *site) for site in SITES]
    kernels += [with_tiles(width.isa, tiles) for tiles in TILES]
    kernels += [chosen(width.isa, site) for site in CHOSEN]
    return build(kernels, width.target)


@pytest.mark.parametrize(("epilogue", "size"), SITES)
def test_every_epilogue(
    library: Any, width: Any, check_linear: Any, epilogue: Epilogue, size: tuple[int, int]
) -> None:
    kernel = with_epilogue(width.isa, epilogue, size)
    for tokens in (1, 16, 17, 33, 50):
        check_linear(library, kernel, torch.randn(size), tokens)


@pytest.mark.parametrize("tiles", TILES)
def test_every_tile_and_token_count(
    library: Any, width: Any, check_linear: Any, tiles: tuple[int, ...]
) -> None:
    kernel = with_tiles(width.isa, tiles)
    for tokens in TOKENS:
        check_linear(library, kernel, torch.randn(tiles[:2]), tokens, threads=(1, 2, 3))
    check_linear(library, kernel, torch.zeros(tiles[:2]), 20)


@pytest.mark.parametrize("site", CHOSEN)
def test_what_the_registry_chooses(
    library: Any, width: Any, check_linear: Any, site: LinearSite
) -> None:
    kernel = chosen(width.isa, site)
    for tokens in (1, 16, 33, 128):
        weight = torch.randn(site.out_features, site.in_features)
        check_linear(library, kernel, weight, tokens, threads=(1, 2))


@pytest.mark.parametrize(("isa", "vectors"), [(AVX512, 5), (AVX2, 3), (NEON, 6), (AVX512, 10)])
def test_token_tiles_that_cannot_be_halved_are_refused(isa: Isa, vectors: int) -> None:
    kernel = DenseLinear(isa, 12, 8, PackedDense(6), Epilogue(), vectors, 2, 8)
    with pytest.raises(ValueError, match=f"a token tile of {vectors} vectors cannot be halved"):
        kernel.build()


def test_names_tell_kernels_apart() -> None:
    kernels = [with_epilogue(isa, *site) for isa in (AVX512, NEON) for site in SITES]
    kernels += [with_tiles(isa, tiles) for isa in (AVX512, NEON) for tiles in TILES]
    assert len({kernel.name for kernel in kernels}) == len(kernels)


def test_neon_has_vector_multiply_adds(assembly_for_neon: Callable[..., str]) -> None:
    kernels = [with_tiles(NEON, TILES[1]), with_epilogue(NEON, Epilogue(True, "silu"), (9, 33))]
    assert "fmla\tv" in assembly_for_neon(kernels)
