"""The routing kernel of every router, against its reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import AVX2
from sparsify.codegen.kernels.cpu.route import Route, Rule, register_rule, rule_of
from sparsify.codegen.target import Target
from sparsify.routers import ROUTERS, TopK, parse
from tests.ops.eager.route import ROUTERS as CASES
from tests.ops.eager.route import parameters_of

MORE = [("softmax_top_k{k=8}", 200), ("tree{trees=1}", 31), ("top_k{k=5}", 5), ("temperature", 8)]


# The kernel is scalar: one width of vectors is all of them.
pytestmark = pytest.mark.isa("x86-avx2")


@pytest.fixture(scope="module")
def library(build: Callable[..., Any]) -> Any:
    kernels = [Route(AVX2, parse(spec).spec, logits) for spec, logits in [*CASES, *MORE]]
    return build(kernels, Target.parse("x86-avx2"))


@pytest.mark.parametrize(("spec", "logits"), CASES + MORE)
def test_every_router(library: Any, spec: str, logits: int) -> None:
    router, parameters = parse(spec), parameters_of(spec, logits)
    kernel = Route(AVX2, router.spec, logits)
    for tokens in (1, 2, 7, 33, 700):
        given = torch.randn(tokens, logits)
        experts, weights = router.route(given, *parameters)
        found = torch.zeros_like(experts)
        scores = library(
            kernel, [given, *parameters, found], weights.shape, threads=(1, 2), changes=[found]
        )
        assert torch.equal(found, experts)
        torch.testing.assert_close(scores, weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("spec", "logits"), CASES)
def test_the_first_of_equal_experts_is_chosen(library: Any, spec: str, logits: int) -> None:
    """Rows of zeros, and of few numbers that are far apart: equal logits make equal gates."""
    router, parameters = parse(spec), parameters_of(spec, logits)
    given = torch.cat([torch.zeros(2, logits), 3.0 * torch.randint(-1, 2, (31, logits))])
    experts, weights = router.route(given, *parameters)
    found = torch.zeros_like(experts)
    kernel = Route(AVX2, router.spec, logits)
    scores = library(kernel, [given, *parameters, found], weights.shape, changes=[found])
    assert torch.equal(found, experts)
    torch.testing.assert_close(scores, weights, rtol=1e-5, atol=1e-5)


def test_no_expert_but_the_first_is_spared_the_threshold(library: Any) -> None:
    given, kernel = torch.zeros(1, 8), Route(AVX2, "temperature", 8)
    found = torch.zeros(1, 8, dtype=torch.int32)
    parameters = [torch.ones(1), torch.full((1,), 0.2)]
    weights = library(kernel, [given, *parameters, found], (1, 8), changes=[found])
    assert found.tolist() == [[0, *[-1] * 7]]
    assert weights.tolist() == [[0.125, *[0.0] * 7]]


@pytest.mark.parametrize(("spec", "logits"), CASES)
def test_nan_is_not_lost(library: Any, spec: str, logits: int) -> None:
    """A token whose logits are NaN goes somewhere with the weight NaN, not nowhere."""
    router, parameters = parse(spec), parameters_of(spec, logits)
    given = torch.full((1, logits), torch.nan)
    shape = (1, router.slots(router.experts(logits)))
    found = torch.zeros(shape, dtype=torch.int32)
    kernel = Route(AVX2, router.spec, logits)
    weights = library(kernel, [given, *parameters, found], shape, changes=[found])
    assert found[0, 0] >= 0 and weights[0, 0].isnan()


def test_every_router_has_a_rule_and_cases() -> None:
    names = {parse(spec).name for spec, _ in CASES}
    ours = {name for name in ROUTERS.names() if rule_of(parse(_example(name))) is not None}
    assert ours == names


def _example(name: str) -> str:
    return next(spec for spec, _ in CASES if spec.startswith(name))


def test_a_router_has_one_rule() -> None:
    class Another(Rule):
        router = TopK

    with pytest.raises(ValueError, match="'top_k' already has the rule"):
        register_rule(Another)
