"""Conversions to lanes and back: exact, for any size, with zeros in unused lanes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import NEON
from sparsify.codegen.kernels.cpu.lanes import FromLanes, ToLanes
from sparsify.ops import to_lanes

FEATURES = (1, 7, 16, 17, 40)
TOKENS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100)


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    kernels = [make(width.isa, n) for n in FEATURES for make in (ToLanes, FromLanes)]
    return build(kernels, width.target)


def values(tokens: int, features: int) -> torch.Tensor:
    """Random numbers with what arithmetic would not keep: infinities, -0, denormals."""
    x = torch.randn(tokens, features)
    flat = x.view(-1)
    special = torch.tensor([float("inf"), -float("inf"), -0.0, 1e-42])
    places = torch.randperm(flat.numel())[:4]
    flat[places] = special[: places.numel()]
    return x


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("features", FEATURES)
def test_to_lanes(library: Any, width: Any, features: int) -> None:
    for tokens in TOKENS:
        x = values(tokens, features)
        shape = (-(-tokens // 16), features, 16)
        found = library(ToLanes(width.isa, features), [x], shape, threads=(1, 2, 3))
        assert same(found, to_lanes.reference(x)), f"{tokens} tokens"


@pytest.mark.parametrize("features", FEATURES)
def test_from_lanes(
    library: Any, width: Any, lanes: Callable[[torch.Tensor], torch.Tensor], features: int
) -> None:
    for tokens in TOKENS:
        x = values(tokens, features)
        kernel = FromLanes(width.isa, features)
        found = library(kernel, [lanes(x)], (tokens, features), threads=(1, 2, 3))
        assert same(found, x), f"{tokens} tokens"


def test_nothing_is_converted_to_nothing(library: Any, width: Any) -> None:
    assert library(ToLanes(width.isa, 7), [torch.empty(0, 7)], (0, 7, 16)).numel() == 0
    assert library(FromLanes(width.isa, 7), [torch.empty(0, 7, 16)], (0, 7)).numel() == 0


def test_neon_shuffles_vectors(assembly_for_neon: Callable[..., str]) -> None:
    for make in (ToLanes, FromLanes):
        assembly = assembly_for_neon([make(NEON, 17)])
        assert "zip1\tv" in assembly or "trn1\tv" in assembly
