"""The benchmark of few tokens runs, checks its results, and states its limit."""

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent
SHORT = ["--threads", "1", "--rounds", "2", "--seconds", "0.001", "--cold", "0.1"]


@pytest.fixture
def spmv(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import spmv

    return spmv


def test_cells_are_timed_and_checked(spmv: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    cells = ["--shapes", "64x96", "--sparsity", "0", "70", "--tokens", "2"]
    assert spmv.main([*cells, *SHORT, "--against", "torch", "openvino", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(c["sparsity"], c["values"]) for c in found] == [
        (0, "fp32"), (0, "bf16"), (70, "fp32"), (70, "bf16"),
    ]  # fmt: skip
    sparse, halves = found[2], found[3]
    assert "value_bits=32" in sparse["layout"] and "value_bits=16" in halves["layout"]
    assert halves["bytes"] < sparse["bytes"] < 4 * 64 * 96
    for cell in found:
        assert set(cell["peers_us"]) == {"torch", "openvino"}
        assert cell["best_peer"] == min(cell["peers_us"], key=cell["peers_us"].get)
        assert 0 < cell["max_rel_error"] < 1e-5
        assert cell["of_limit"] > 0 and 1e8 < cell["bandwidth"] < 1e12
        speedup = cell["speedup"]
        assert 0 < speedup["low"] <= speedup["median"] <= speedup["high"]


def test_copies_take_turns(spmv: ModuleType) -> None:
    seen: list[int] = []
    turns = spmv.Turns([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(7):
        turns()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_a_wrong_result_fails_the_run(
    spmv: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spmv, "relative_error", lambda *_: (1.0, 1.0))
    given = ["--shapes", "8x40", "--sparsity", "0", "--tokens", "1", "--against", "torch"]
    assert spmv.main([*given, *SHORT, "--json"]) == 1
    assert "2 cells exceed an error of" in capsys.readouterr().err
