"""The benchmark of inactive features runs, checks its results, and says what misses its goal."""

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def gating(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gating

    return gating


def test_cells_are_timed_and_checked(
    gating: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = ["--linears", "64x96", "--ffns", "32x48", "--inactive", "90", "--tokens", "1"]
    short = ["--threads", "1", "--rounds", "2", "--seconds", "0.001", "--against", "torch"]
    assert gating.main([*cells, *short, "--json"]) == 0
    linear, ffn = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (linear["kind"], ffn["kind"]) == ("linear", "ffn")
    assert (linear["goal"], ffn["goal"]) == (0.14, 0.45)
    assert "10% of inputs active at 1 token" in linear["layout"]
    for cell in (linear, ffn):
        assert set(cell["peers_us"]) == {"torch"} and cell["best_peer"] == "torch"
        assert 0 < cell["max_rel_error"] < 1e-5
        assert 0 < cell["of_dense"]["low"] <= cell["of_dense"]["median"]
