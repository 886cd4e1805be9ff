"""The gate against float64: every activation, in rows and in lanes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import NEON, Isa
from sparsify.codegen.kernels.cpu.gated import Gated
from sparsify.layouts import Form
from sparsify.ops import ACTIVATIONS, from_lanes, gated

FORMS: tuple[Form, ...] = ("rows", "lanes")
FEATURES = (1, 7, 31, 33, 200)
TOKENS = (1, 7, 8, 9, 16, 31, 33, 150)


def kernel(isa: Isa, features: int, activation: str, form: Form) -> Gated:
    return Gated(isa, features, activation, form)


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    kernels = [kernel(width.isa, n, "silu", form) for n in FEATURES for form in FORMS]
    kernels += [kernel(width.isa, 33, a, f) for a in ACTIVATIONS for f in FORMS if a != "silu"]
    return build(kernels, width.target)


@pytest.fixture
def check(library: Any, lanes: Callable[..., Any]) -> Callable[..., None]:
    def run(kernel: Gated, tokens: int) -> None:
        x = 3 * torch.randn(tokens, 2 * kernel.features)
        given = lanes(x) if kernel.form == "lanes" else x
        shape = (given.shape[0], kernel.features, *given.shape[2:])
        found = library(kernel, [given], shape, threads=(1, 2, 3))
        if kernel.form == "lanes":
            found = from_lanes.reference(found, (tokens,))
        expected = gated.reference(x.double(), kernel.activation)
        up = x[:, kernel.features :].double().abs()
        # The activations' own errors, scaled by what they are multiplied with.
        allowed = 4e-7 * up * x.abs().max().clamp_min(8) + 1e-6 * expected.abs()
        assert bool(((found - expected).abs() <= allowed).all()), (kernel.name, tokens)

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("features", FEATURES)
def test_every_size(check: Callable[..., None], width: Any, features: int, form: Form) -> None:
    for tokens in TOKENS:
        check(kernel(width.isa, features, "silu", form), tokens)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(
    check: Callable[..., None], width: Any, activation: str, form: Form
) -> None:
    for tokens in (1, 40):
        check(kernel(width.isa, 33, activation, form), tokens)


def test_names_tell_kernels_apart() -> None:
    kernels = [kernel(NEON, n, a, f) for n in FEATURES for a in ACTIVATIONS for f in FORMS]
    assert len({k.name for k in kernels}) == len(kernels)


@pytest.mark.parametrize("form", FORMS)
def test_neon_has_vector_multiply_adds(assembly_for_neon: Callable[..., str], form: Form) -> None:
    assert "fmla\tv" in assembly_for_neon([kernel(NEON, 33, "silu", form)])
