"""The sparse linear kernel against float64: sizes, tiles, epilogues, patterns, threads."""

import dataclasses
import re
from collections.abc import Callable
from itertools import cycle, product
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import AVX512, NEON, Isa
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.sell import SellLinear
from sparsify.codegen.registry import LinearSite, linear_kernels
from sparsify.codegen.target import Target
from sparsify.layouts import Sell
from sparsify.ops import ACTIVATIONS

TOKENS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100)

# (out_features, in_features)
SIZES = [(1, 1), (7, 5), (8, 16), (9, 33), (15, 31), (16, 8), (17, 9), (31, 15), (32, 32), (33, 17)]

# (out_features, in_features, rows, k_block, window, windows of a task, vectors)
TILES = [
    (64, 100, 8, 32, 8, 1, 2),  # four K blocks, a task for each group of rows
    (65, 100, 8, 33, 24, 1, 2),  # ragged rows, ragged last K block, ragged last task
    (33, 257, 4, 64, 12, 2, 4),
    (130, 40, 16, 40, 32, 2, 1),
    (5, 130, 12, 7, 12, 1, 2),  # fewer rows than a group
]


# Every combination without an activation, and every activation with all else.
EPILOGUES = [
    Epilogue(bias, activation, residual)
    for activation, bias, residual in product(ACTIVATIONS, (False, True), (False, True))
    if (bias and residual) or activation == "none"
]
SITES = list(zip(EPILOGUES, cycle(SIZES), strict=False))


def with_epilogue(isa: Isa, epilogue: Epilogue, size: tuple[int, int]) -> SellLinear:
    out_features, in_features = size
    window = -(-out_features // 4) * 4
    layout = Sell(rows=4, k_block=max(1, -(-in_features // 2)), window=window)
    return SellLinear(isa, out_features, in_features, layout, epilogue, 1, window // 4)


def with_tiles(isa: Isa, tiles: tuple[int, ...]) -> SellLinear:
    out_features, in_features, rows, k_block, window, windows, vectors = tiles
    layout = Sell(rows, k_block, window)
    epilogue = Epilogue(bias=True, residual=True)
    groups = windows * window // rows
    return SellLinear(isa, out_features, in_features, layout, epilogue, vectors, groups)


SITE = LinearSite(65, 300, True, "relu", True)


def considered(isa: Isa) -> list[Any]:
    """The kernels among which a compilation chooses."""
    shape = (SITE.out_features, SITE.in_features)
    kernels = linear_kernels(Sell(), 128)
    candidates = kernels.candidates(isa, shape, shape[0] * shape[1] // 5)
    return [kernels.kernel(isa, SITE, layout) for layout in candidates]


def weights(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Patterns that stress padding, sorting and empty groups."""
    full = torch.randn(shape)
    rows, columns = shape
    ragged = torch.rand(shape) < torch.rand(rows, 1) ** 3
    one_row, one_column, staircase = (torch.zeros(shape) for _ in range(3))
    one_row[rows // 2] = 1
    one_column[:, -1] = 1
    staircase[torch.arange(columns) <= torch.arange(rows)[:, None]] = 1
    every_other = (torch.arange(rows) % 2)[:, None]
    return {
        "random": full * (torch.rand(shape) < 0.3),
        "zero": torch.zeros(shape),
        "dense": full,
        "ragged": full * ragged,
        "one row": full * one_row,
        "one column": full * one_column,
        "staircase": full * staircase,
        "empty rows": full * every_other * (torch.rand(shape) < 0.5),
        "first columns": full * (torch.arange(columns) < columns // 3),
    }


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    kernels = [with_epilogue(width.isa, *site) for site in SITES]
    kernels += [with_tiles(width.isa, tiles) for tiles in TILES]
    kernels += considered(width.isa)
    return build(kernels, width.target)


@pytest.mark.parametrize(("epilogue", "size"), SITES)
def test_every_epilogue(
    library: Any, width: Any, check_linear: Any, epilogue: Epilogue, size: tuple[int, int]
) -> None:
    kernel = with_epilogue(width.isa, epilogue, size)
    for tokens in (1, 16, 17, 33, 50):
        check_linear(library, kernel, torch.randn(size) * (torch.rand(size) < 0.4), tokens)


@pytest.mark.parametrize("tiles", TILES)
def test_every_tile_and_token_count(
    library: Any, width: Any, check_linear: Any, tiles: tuple[int, ...]
) -> None:
    kernel = with_tiles(width.isa, tiles)
    for tokens in TOKENS:
        check_linear(library, kernel, weights(tiles[:2])["random"], tokens, threads=(1, 2, 3))


@pytest.mark.parametrize("pattern", weights((2, 2)))
@pytest.mark.parametrize("tiles", TILES)
def test_every_pattern(
    library: Any, width: Any, check_linear: Any, tiles: tuple[int, ...], pattern: str
) -> None:
    kernel = with_tiles(width.isa, tiles)
    for tokens in (3, 40):
        check_linear(library, kernel, weights(tiles[:2])[pattern], tokens)


def test_what_the_registry_offers(library: Any, width: Any, check_linear: Any) -> None:
    weight = weights((SITE.out_features, SITE.in_features))["random"]
    for kernel in considered(width.isa):
        for tokens in (1, 16, 33, 128):
            check_linear(library, kernel, weight, tokens, threads=(1, 2))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_small_and_large_activations(
    library: Any, width: Any, check_linear: Any, scale: float
) -> None:
    kernel = with_tiles(width.isa, TILES[0])
    check_linear(library, kernel, weights(TILES[0][:2])["random"], 20, scale=scale)


@pytest.mark.isa("x86-avx512")
def test_weights_spread_by_permutes_and_by_loads_agree(
    build: Callable[..., Any], lanes: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    weight, x = weights((64, 100))["random"], torch.randn(33, 100)
    bias, residual = torch.randn(64), torch.randn(33, 64)
    found = []
    for permuted in (0, 3, 4):
        isa = dataclasses.replace(AVX512, permuted_of_four=permuted)
        kernel = with_tiles(isa, TILES[0])
        inputs = [lanes(x), *kernel.layout.pack(weight).values(), bias, lanes(residual)]
        library = build([kernel], Target.parse("x86-avx512"))
        found.append(library(kernel, inputs, (3, 64, 16)).nan_to_num())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_tasks_that_split_a_sorting_window_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chunks of 8 rows would split a sorting window of 16"):
        SellLinear(AVX512, 64, 64, Sell(8, 32, 16), Epilogue(), 2, chunk_groups=1)


def test_names_tell_kernels_apart() -> None:
    kernels = [with_epilogue(isa, *site) for isa in (AVX512, NEON) for site in SITES]
    kernels += [with_tiles(isa, tiles) for isa in (AVX512, NEON) for tiles in TILES]
    assert len({kernel.name for kernel in kernels}) == len(kernels)


def test_neon_has_vector_multiply_adds(assembly_for_neon: Callable[..., str]) -> None:
    kernels = [with_tiles(NEON, TILES[2]), with_epilogue(NEON, Epilogue(True, "gelu"), (9, 33))]
    assembly = assembly_for_neon(kernels)
    assert "fmla\tv" in assembly
    assert re.search(r"ld1\t{ v\d+.4s(, v\d+.4s){3} }", assembly), "no load of four vectors"
