"""Layer and root-mean-square normalisation against float64."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import NEON, Isa
from sparsify.codegen.kernels.cpu.norm import Norm, RowNorm
from sparsify.layouts import Form
from sparsify.ops import from_lanes, fused_norm

FEATURES = (1, 2, 7, 33, 200)
TOKENS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100)

# (kind, weight, bias)
KINDS = [("layer", *flags) for flags in product((False, True), (False, True))]
KINDS += [("rms", False, False), ("rms", True, False)]

FORMS: tuple[Form, ...] = ("rows", "lanes")

Check = Callable[..., None]


def norm(
    isa: Isa,
    features: int,
    kind: tuple[str, bool, bool],
    epsilon: float = 1e-5,
    form: Form = "lanes",
) -> Norm:
    name, weight, bias = kind
    kernel = Norm if form == "lanes" else RowNorm
    return kernel(isa, features, name, epsilon, weight, bias)


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    kernels = []
    for form in FORMS:
        both = (KINDS[3], KINDS[5])
        kernels += [norm(width.isa, n, kind, form=form) for n in FEATURES for kind in both]
        kernels += [norm(width.isa, 33, kind, form=form) for kind in KINDS]
        kernels += [norm(width.isa, 33, kind, 1e-12, form) for kind in both]
    return build(kernels, width.target)


@pytest.fixture
def check(library: Any, lanes: Callable[[torch.Tensor], torch.Tensor]) -> Check:
    def run(kernel: Norm, x: torch.Tensor) -> None:
        weight = torch.randn(kernel.features) if kernel.weight else None
        bias = torch.randn(kernel.features) if kernel.bias else None
        in_rows = isinstance(kernel, RowNorm)
        given = x if in_rows else lanes(x)
        y = library(kernel, [given, weight, bias], given.shape, threads=(1, 2, 3))
        found = y if in_rows else from_lanes.reference(y, (x.shape[0],))
        operands = [None if t is None else t.double() for t in (x, weight, bias)]
        expected = fused_norm.reference(*operands, kernel.epsilon, kernel.kind)
        # Subtracting the mean leaves a rounding error of the largest x, which is then scaled up.
        variance = x.double().var(-1, keepdim=True, correction=0)
        cancelled = x.abs().amax(-1, keepdim=True) * (variance + kernel.epsilon).rsqrt()
        largest = 1.0 if weight is None else weight.abs().max()
        allowed = 2e-6 * expected.abs().clamp_min(1) + 3e-7 * largest * cancelled
        error = ((found - expected).abs() / allowed).max()
        assert error <= 1, f"{kernel.name} on {tuple(x.shape)}: {error:.2f} of what is allowed"

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kind", [KINDS[3], KINDS[5]])
def test_every_size(
    check: Check, width: Any, features: int, kind: tuple[str, bool, bool], form: Form
) -> None:
    for tokens in (*TOKENS, 200):
        check(norm(width.isa, features, kind, form=form), torch.randn(tokens, features))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(check: Check, width: Any, kind: tuple[str, bool, bool], form: Form) -> None:
    for tokens in (1, 20):
        check(norm(width.isa, 33, kind, form=form), torch.randn(tokens, 33))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [KINDS[3], KINDS[5]])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-12])
def test_epsilon_decides_where_there_is_no_deviation(
    check: Check, width: Any, kind: tuple[str, bool, bool], epsilon: float, form: Form
) -> None:
    kernel = norm(width.isa, 33, kind, epsilon, form)
    x = torch.randn(20, 33)
    x[3] = 0
    x[4] *= 1e-4
    x[5] = 0.5
    check(kernel, x)


@pytest.mark.parametrize("form", FORMS)
def test_the_variance_does_not_cancel(check: Check, width: Any, form: Form) -> None:
    """The mean of the squares less the square of the mean would lose all digits."""
    check(norm(width.isa, 200, KINDS[3], form=form), torch.randn(20, 200) + 3000)


def test_a_row_with_nan_spoils_no_other(
    library: Any, width: Any, lanes: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = torch.randn(20, 33)
    x[7, 5] = float("nan")
    y = library(norm(width.isa, 33, KINDS[0]), [lanes(x)], (2, 33, 16))
    found = from_lanes.reference(y, (20,)).isnan().any(-1)
    assert found.tolist() == [i == 7 for i in range(20)]


def test_names_tell_kernels_apart() -> None:
    kernels = [
        norm(NEON, n, kind, epsilon, form)
        for n, kind, epsilon, form in product(FEATURES, KINDS, (1e-5, 1e-12), FORMS)
    ]
    assert len({kernel.name for kernel in kernels}) == len(kernels)


def test_neon_has_vector_arithmetic(assembly_for_neon: Callable[..., str]) -> None:
    assembly = assembly_for_neon([norm(NEON, 33, KINDS[3])])
    assert "fmla\tv" in assembly
    assert "fsqrt\tv" in assembly
    assert "fmla\tv" in assembly_for_neon([norm(NEON, 33, KINDS[3], form="rows")])
