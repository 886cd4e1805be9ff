"""Gate and up projections with the gate between them, against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import AVX512, NEON, Isa
from sparsify.codegen.kernels.cpu.sell_gated import GatedSell
from sparsify.codegen.registry import GatedKernels, LinearSite, linear_kernels
from sparsify.layouts import Sell
from sparsify.ops import ACTIVATIONS, from_lanes, gated

TOKENS = (1, 7, 15, 16, 17, 31, 32, 33, 63, 65, 100)

# (features, in_features, rows, k_block, window, bias, activation, vectors)
TILES = [
    (16, 33, 4, 33, 16, True, "silu", 4),  # one window
    (48, 100, 8, 32, 16, False, "silu", 2),  # three windows, a ragged last K block
    (24, 31, 12, 7, 12, True, "gelu", 1),
    (8, 5, 4, 2, 4, True, "gelu_tanh", 4),
]
SMALL = [(8, 9, 4, 9, 8, True, activation, 2) for activation in ACTIVATIONS]


def kernel(isa: Isa, tiles: tuple[Any, ...]) -> GatedSell:
    features, in_features, rows, k_block, window, bias, activation, vectors = tiles
    layout = Sell(rows, k_block, window)
    return GatedSell(isa, features, in_features, layout, bias, activation, vectors)


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    return build([kernel(width.isa, tiles) for tiles in TILES + SMALL], width.target)


@pytest.mark.parametrize("tiles", TILES + SMALL)
def test_every_tile_and_token_count(
    library: Any, width: Any, lanes: Callable[..., Any], tiles: tuple[Any, ...]
) -> None:
    spec = kernel(width.isa, tiles)
    shape = (2 * spec.features, spec.in_features)
    weight = torch.randn(shape) * (torch.rand(shape) < 0.4)
    bias = torch.randn(shape[0]) if spec.bias else None
    for tokens in TOKENS:
        x = torch.randn(tokens, spec.in_features)
        given = [lanes(x), *spec.layout.pack(weight).values(), bias]
        found = library(spec, given, (-(-tokens // 16), spec.features, 16), threads=(1, 2, 3))
        sums = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        expected = gated.reference(sums, spec.activation)
        scale = sums.abs().max() ** 2
        error = (from_lanes.reference(found, (tokens,)) - expected).abs().max()
        assert error <= 2e-6 * scale, (spec.name, tokens)


def test_the_registry_offers_it_for_whole_windows() -> None:
    kernels = linear_kernels(Sell(), 128)
    assert isinstance(kernels, GatedKernels)
    for features, found in ((1536, True), (1535, False)):
        site = LinearSite(2 * features, 576)
        layout = Sell(8, 192, 384)
        assert (kernels.gated_kernel(AVX512, site, layout, "silu") is not None) == found


def test_windows_that_straddle_gate_and_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"20 features are not whole sorting windows of 16 rows"):
        kernel(AVX512, (20, 5, 4, 5, 16, False, "silu", 2))


def test_names_tell_kernels_apart() -> None:
    names = {kernel(isa, tiles).name for isa in (AVX512, NEON) for tiles in TILES + SMALL}
    assert len(names) == 2 * len(TILES + SMALL)
