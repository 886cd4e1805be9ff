"""Interleaved timing, paired ratios and their interval, and the error measure."""

import math
import time

import numpy as np
import pytest
import torch

from sparsify.bench import Samples, fastest, interleave, ratio, relative_error


def samples(name: str, medians: list[float]) -> Samples:
    return Samples(name, tuple((m, m, m) for m in medians))


def test_every_candidate_gets_every_round_in_turns() -> None:
    calls: list[str] = []

    def candidate(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    found = interleave(
        {"a": lambda: candidate("a", 0.002), "b": lambda: candidate("b", 0.004)},
        rounds=4,
        seconds=0.01,
        warmup=1,
    )
    assert list(found) == ["a", "b"]
    assert all(len(s.rounds) == 4 for s in found.values())
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert len(turns) >= 6, "the candidates must take turns, not run one after the other"
    assert 0.002 <= found["a"].median < found["b"].median
    assert 1.3 < ratio(found["b"], found["a"]).median < 3


def test_calls_shorter_than_the_clock_are_timed_together() -> None:
    found = interleave({"none": lambda: None}, rounds=2, seconds=0.001)
    assert found["none"].median < 1e-6


@pytest.mark.parametrize("options", [{"rounds": 1}, {"seconds": 0}])
def test_what_cannot_be_timed_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="interleave: rounds="):
        interleave({"a": lambda: None}, **options)  # type: ignore[arg-type]


def test_no_candidate_is_refused() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        interleave({})


def test_a_ratio_is_paired_by_round() -> None:
    drift = [1.0, 3.0, 2.0, 5.0, 1.5, 4.0]
    found = ratio(samples("a", [2 * d for d in drift]), samples("b", drift))
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    noise = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        a = samples("a", list(1.5 * noise.lognormal(0, 0.1, 15)))
        b = samples("b", list(noise.lognormal(0, 0.1, 15)))
        found = ratio(a, b, resamples=500, seed=trial)
        assert found.low <= found.median <= found.high
        held += found.low <= 1.5 <= found.high
    assert 0.88 < held / 200 < 1.0


def test_the_inverse_turns_the_interval_round() -> None:
    found = ratio(samples("a", [1.0, 2.0, 1.5]), samples("b", [2.0, 2.0, 2.0])).inverse
    assert found.low <= found.median <= found.high
    assert found.median == pytest.approx(1 / 0.75)


def test_a_ratio_of_different_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' has 3 rounds and 'b' 2"):
        ratio(samples("a", [1, 1, 1]), samples("b", [1, 1]))


def test_percentiles_and_the_fastest() -> None:
    found = {"slow": Samples("slow", ((1.0, 2.0), (3.0, 4.0))), "fast": samples("fast", [1, 1])}
    assert found["slow"].percentile(50) == 2.5
    assert found["slow"].median == 2.5
    assert found["slow"].to_dict()["calls"] == 4
    assert fastest(found, found) == "fast"


def test_errors_are_relative_to_the_largest_value() -> None:
    reference = torch.tensor([1.0, -4.0])
    absolute, relative = relative_error(reference + torch.tensor([0.0, 0.5]), reference)
    assert (absolute, relative) == (0.5, 0.125)
    worst = relative_error([reference, reference + 1], [reference, reference])
    assert worst == (1.0, 0.25)


def test_values_that_are_not_finite_must_agree() -> None:
    inf, nan = torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.nan])
    assert relative_error(inf, inf) == (0, 0)
    assert relative_error(nan, nan) == (0, 0)
    assert relative_error(nan, torch.ones(2))[1] == math.inf
    assert relative_error(inf, -inf)[1] == math.inf
    assert relative_error(torch.ones(1), torch.zeros(1))[1] == math.inf


def test_outputs_of_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        relative_error(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="differ in number: 1 against 2"):
        relative_error([torch.ones(2)], [torch.ones(2), torch.ones(2)])
