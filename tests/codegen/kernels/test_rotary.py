"""Rotary position embedding against float64, in rows and in lanes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import NEON, Isa
from sparsify.codegen.kernels.cpu.rotary import Rotary
from sparsify.layouts import Form
from sparsify.ops import from_lanes, rotary

FORMS: tuple[Form, ...] = ("rows", "lanes")
TOKENS = (1, 7, 8, 9, 16, 31, 33, 150)

# (heads, head_dim, features): with and without features to copy.
SIZES = [(1, 2, 2), (3, 6, 20), (2, 24, 48), (4, 24, 100), (9, 64, 960), (2, 256, 513)]


def kernel(isa: Isa, size: tuple[int, int, int], form: Form) -> Rotary:
    return Rotary(isa, *size, form)


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    return build([kernel(width.isa, s, form) for s in SIZES for form in FORMS], width.target)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_every_size(
    library: Any, width: Any, lanes: Callable[..., Any], size: tuple[int, int, int], form: Form
) -> None:
    heads, head_dim, features = size
    for tokens in TOKENS:
        x, angles = torch.randn(tokens, features), 6 * torch.randn(tokens, head_dim)
        operands = [x, angles.cos(), angles.sin()]
        given = [lanes(t) for t in operands] if form == "lanes" else operands
        found = library(kernel(width.isa, size, form), given, given[0].shape, threads=(1, 2, 3))
        if form == "lanes":
            found = from_lanes.reference(found, (tokens,))
        expected = rotary.reference(*(t.double() for t in operands), heads, head_dim)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(found[:, heads * head_dim :], x[:, heads * head_dim :])


def test_names_tell_kernels_apart() -> None:
    kernels = [kernel(NEON, size, form) for size in SIZES for form in FORMS]
    assert len({k.name for k in kernels}) == len(kernels)


@pytest.mark.parametrize("form", FORMS)
def test_neon_has_vector_multiply_adds(assembly_for_neon: Callable[..., str], form: Form) -> None:
    assert "fmla\tv" in assembly_for_neon([kernel(NEON, SIZES[4], form)])
