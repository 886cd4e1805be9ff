"""Gates against float64: every rule, in rows and in lanes, with exact zeros."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import NEON, Isa
from sparsify.codegen.kernels.cpu.gate import GateKernel
from sparsify.gates import gate_names, parse
from sparsify.layouts import Form
from sparsify.ops import from_lanes

FORMS: tuple[Form, ...] = ("rows", "lanes")
FEATURES = (1, 7, 33, 200)
TOKENS = (1, 7, 8, 9, 16, 31, 33, 150)


def rules(features: int) -> list[str]:
    found = ["threshold", "channel_threshold"]
    counts = {1, (features + 1) // 2, features} if features == 7 else {(features + 1) // 2}
    found += [f"{name}{{k={k}}}" for name in ("top_k", "weighted_top_k") for k in counts]
    return found + [f"statistical_top_k{{k={k}}}" for k in counts if k < features]


def kernel(isa: Isa, features: int, rule: str, form: Form) -> GateKernel:
    return GateKernel(isa, features, parse(rule), form)


def parameters_of(rule: str, features: int) -> list[torch.Tensor]:
    return [torch.rand(shape) for shape in parse(rule).shapes(features)]


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    return build(
        [kernel(width.isa, n, rule, f) for n in FEATURES for rule in rules(n) for f in FORMS],
        width.target,
    )


@pytest.fixture
def check(library: Any, lanes: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    def run(kernel: GateKernel, x: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
        given = lanes(x) if kernel.form == "lanes" else x
        found = library(kernel, [given, *parameters], given.shape, threads=(1, 2, 3))
        if kernel.form == "lanes":
            found = from_lanes.reference(found, (len(x),))
        return found

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("features", FEATURES)
def test_every_size(check: Callable[..., Any], width: Any, features: int, form: Form) -> None:
    for rule in rules(features):
        for tokens in TOKENS:
            x, parameters = torch.randn(tokens, features), parameters_of(rule, features)
            found = check(kernel(width.isa, features, rule, form), x, parameters)
            keep = parse(rule).keep(x.double(), *(p.double() for p in parameters))
            # What float32 may decide otherwise: values at the threshold itself.
            noise = 2e-6 * torch.randn(tokens, features, dtype=torch.float64).sign()
            moved = [parse(rule).keep(x + n, *parameters) for n in (noise, -noise)]
            doubtful = (moved[0] != keep) | (moved[1] != keep)
            expected = torch.where(keep, x, 0)
            assert torch.equal(found[~doubtful], expected[~doubtful]), (rule, tokens)
            assert doubtful.float().mean() < 0.01


@pytest.mark.parametrize("form", FORMS)
def test_top_k_of_equal_denormal_and_infinite_values(
    check: Callable[..., Any], width: Any, form: Form
) -> None:
    rows = [
        [1.0, -1.0, 1.0, 0.5, 0.5, 0.5, 0.5],
        [0.0] * 7,
        [1e-40, -2e-40, 3e-40, -4e-40, 5e-40, 6e-40, 7e-40],
        [torch.inf, -torch.inf, 1.0, 2.0, 3.0, -4.0, 5.0],
        [3.4e38, -3.3e38, 1e-38, 0.0, -0.0, 1.0, 2.0],
    ]
    x = torch.tensor(rows)
    for k in (1, 4, 7):
        rule = f"top_k{{k={k}}}"
        found = check(kernel(width.isa, 7, rule, form), x, [])
        last = x.abs().sort(-1, descending=True).values[:, k - 1 : k]
        assert torch.equal(found, torch.where(x.abs() >= last, x, 0)), k


@pytest.mark.parametrize("form", FORMS)
def test_nan_is_kept(check: Callable[..., Any], width: Any, form: Form) -> None:
    x = torch.randn(3, 33)
    x[1, 5] = torch.nan
    for rule in rules(33):
        found = check(kernel(width.isa, 33, rule, form), x, parameters_of(rule, 33))
        assert found[1, 5].isnan(), rule


def test_every_rule_is_here() -> None:
    assert {rule.partition("{")[0] for rule in rules(9)} == set(gate_names())


def test_names_tell_kernels_apart() -> None:
    kernels = [kernel(NEON, n, r, f) for n in FEATURES for r in rules(n) for f in FORMS]
    assert len({k.name for k in kernels}) == len(kernels)


@pytest.mark.parametrize("form", FORMS)
def test_neon_compares_vectors(assembly_for_neon: Callable[..., str], form: Form) -> None:
    assert "fcmg" in assembly_for_neon([kernel(NEON, 33, "channel_threshold", form)])
