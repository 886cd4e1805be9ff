"""The onnx package's node tests: a sample of them compiled, and one for each handler imported."""

from __future__ import annotations

import onnx
import pytest

from sparsify.frontend.onnx.registry import STANDARD, handlers, standard
from tests.peers.onnx_node_tests.cases import Case, all_cases, sample
from tests.peers.onnx_node_tests.check import check
from tests.peers.onnx_node_tests.outcome import Outcome, count_by_verdict, read_failing
from tests.peers.onnx_node_tests.pool import Pool

MADE_FOR = "1.23.2"
MOST_FAILING = 106
"""The number of cases on the list. It goes down only."""

pytestmark = pytest.mark.skipif(
    onnx.__version__ != MADE_FOR,
    reason=f"the list is of the cases of onnx {MADE_FOR}, not {onnx.__version__}",
)


@pytest.fixture(scope="module")
def passing() -> list[Case]:
    """The cases that are not on the list of those that fail."""
    failing = read_failing()
    return [case for case in all_cases() if case.name not in failing]


def test_a_sample_passes_compiled(passing: list[Case]) -> None:
    outcomes = {case.name: outcome for case, outcome in Pool(check).run(sample(passing, 40))}
    assert not {name: str(o) for name, o in outcomes.items() if not o.passed}
    assert count_by_verdict(outcomes.values())["whole"] > 13


def test_each_handler_has_a_case(passing: list[Case]) -> None:
    """Or a comparison with ONNX Runtime elsewhere: those outside the standard domain."""
    wanted = {handler.operator for handler in handlers() if handler.domain == STANDARD}
    chosen: list[Case] = []
    for case in passing:
        found = {n.op_type for n in case.model.graph.node if standard(n.domain) == STANDARD}
        if found & wanted:
            wanted -= found
            chosen.append(case)
    assert wanted <= WITHOUT_CASE
    outcomes = {case.name: check(case, eager=True) for case in chosen}
    assert not {name: str(o) for name, o in outcomes.items() if not o.passed}


WITHOUT_CASE = {"GlobalLpPool", "SimplifiedLayerNormalization"}
"""Compared with ONNX Runtime in tests/frontend/onnx."""


def test_the_list_only_shrinks() -> None:
    failing = read_failing()
    assert len(failing) <= MOST_FAILING
    assert list(failing) == sorted(failing)
    assert set(failing) <= {case.name for case in all_cases()}


def test_a_crash_and_an_endless_loop_are_outcomes(passing: list[Case]) -> None:
    def fail(case: Case) -> Outcome:
        if case.name == first.name:
            import os

            os.abort()
        while case.name == second.name:
            pass
        return Outcome("whole")

    first, second, third = passing[:3]
    verdicts = {c.name: str(o) for c, o in Pool(fail, seconds=1).run([first, second, third])}
    assert verdicts[first.name] == "crashed: the process died of SIGABRT"
    assert verdicts[second.name] == "crashed: the process died of SIGXCPU"
    assert verdicts[third.name] == "whole"


@pytest.mark.slow
def test_all_but_those_on_the_list_pass() -> None:
    outcomes = {case.name: outcome for case, outcome in Pool(check).run(all_cases())}
    failing = {name: str(outcome) for name, outcome in outcomes.items() if not outcome.passed}
    assert failing.keys() == read_failing().keys()
