"""Compiling with measured layouts: same numbers, and a report that says what was measured."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsify
from sparsify.codegen import target, tune
from sparsify.codegen.tune import Effort

from .conftest import Small, examples


@pytest.fixture(autouse=True)
def quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(tune.EFFORTS, "quick", Effort(1, 2, 0.0005))


def linears(compiled: Any) -> list[Any]:
    return [d for d in compiled.report if d.made_by == "select_layout"]


def test_layouts_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = Small().eval(), examples()
    compiled = sparsify.compile(model, ((), inputs), num_threads=1, tune="quick")
    expected = model(**inputs)
    for name, found in compiled(**inputs).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)
    decisions = linears(compiled)
    assert len(decisions) == 3
    for decision in decisions:
        assert decision.measured_seconds is not None and 0 < decision.measured_seconds < 1e-2
        assert "predicted" not in decision.reason
    assert any("measured" in decision.reason for decision in decisions)
    kept = sorted((tmp_path / "tuned").glob("*.json"))
    assert kept
    # Other weights of the same shapes and densities: a new compilation, but nothing to measure.
    monkeypatch.setattr(tune, "in_turns", lambda *_: pytest.fail("measured again"))
    with torch.no_grad():
        model.up.weight.mul_(2)
    again = sparsify.compile(model, ((), inputs), num_threads=1, tune="quick")
    assert not again.report.facts["cached"]
    assert [d.layout for d in linears(again)] == [d.layout for d in decisions]


def test_without_a_cache_nothing_is_kept(tmp_path: Path) -> None:
    sparsify.compile(Small().eval(), ((), examples()), tune="quick", cache=False)
    assert not (tmp_path / "tuned").exists()


def test_a_tuned_compilation_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = Small().eval(), ((), examples())
    assert not sparsify.compile(model, given).report.facts["cached"]
    assert not sparsify.compile(model, given, tune="quick").report.facts["cached"]
    assert sparsify.compile(model, given, tune="quick").report.facts["cached"]
    # Another CPU that runs the same code: predictions hold there, measurements do not.
    monkeypatch.setattr(target, "host_model", lambda: "another CPU")
    assert sparsify.compile(model, given).report.facts["cached"]
    assert not sparsify.compile(model, given, tune="quick").report.facts["cached"]


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved model whose measurements, so it was made to believe, turn predictions around."""
    monkeypatch.setitem(tune.EFFORTS, "quick", Effort(16, 1, 0.0))
    monkeypatch.setattr(
        tune, "in_turns", lambda calls, *_: {name: 1e-3 / (1 + i) for i, name in enumerate(calls)}
    )
    compiled = sparsify.compile(Small().eval(), ((), examples()), num_threads=1, tune="quick")
    compiled.save(tmp_path / "tuned.sparsify")
    return tmp_path / "tuned.sparsify"


def test_measured_layouts_outlive_a_rebuild(tuned: Path, tmp_path: Path) -> None:
    expected = linears(sparsify.load(tuned))
    predicted = sparsify.compile(Small().eval(), ((), examples()), num_threads=1)
    assert {d.layout for d in expected} != {d.layout for d in linears(predicted)}
    for round_ in range(2):  # a rebuilt model is a tuned one still
        loaded = sparsify.load(tuned, trusted=False)
        for found, wanted in zip(linears(loaded), expected, strict=True):
            assert (found.site, found.layout) == (wanted.site, wanted.layout)
            assert found.measured_seconds == wanted.measured_seconds
            assert "measured when first compiled" in found.reason
        for name, value in Small().eval()(**examples(2, 40)).items():
            torch.testing.assert_close(loaded(**examples(2, 40))[name], value, rtol=1e-4, atol=1e-5)
        tuned = tmp_path / f"{round_}.sparsify"
        loaded.save(tuned)


@pytest.mark.isa("x86-avx2")
def test_measured_layouts_are_not_for_another_target(tuned: Path) -> None:
    with pytest.warns(UserWarning, match=r"layouts were measured for target 'native.*predicted"):
        loaded = sparsify.load(tuned, target="x86-avx2")
    assert all(d.measured_seconds is None for d in linears(loaded))


class Skipping(nn.Module):
    """Two linears of one shape; the second may skip zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = [self.second.weight]
        y = self.first(x).relu()
        found: torch.Tensor = torch.ops.sparsify.active_linear(y, weight, "dense", 64, 64, 0.05)
        return found


def test_sites_that_skip_zeros_are_predicted_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were times measured without zeros taken for theirs, nothing would be skipped."""
    monkeypatch.setattr(tune, "in_turns", lambda calls, *_: dict.fromkeys(calls, 1e-12))
    model, x = Skipping().eval(), torch.randn(1, 64)
    tuned, plain = (
        {d.site: d for d in linears(sparsify.compile(model, (x,), dynamic_shapes=None, **more))}
        for more in ({"tune": "quick"}, {})
    )
    assert tuned["first"].measured_seconds is not None
    assert tuned["second"].measured_seconds is None
    assert "tuning times no kernels that skip zeros" in tuned["second"].reason
    assert tuned["second"].layout == plain["second"].layout
    assert "5% of inputs active" in tuned["second"].reason
