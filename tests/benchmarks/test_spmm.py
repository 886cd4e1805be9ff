"""The benchmark of linear kernels runs, checks its results, and reads DLMC patterns."""

import json
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
SHORT = ["--tokens", "9", "--threads", "1", "--rounds", "2", "--seconds", "0.001"]


@pytest.fixture
def spmm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import spmm

    return spmm


@pytest.fixture
def patterns(tmp_path: Path) -> Path:
    """A collection of one layer: 3 by 4, six nonzeros, its second row empty."""
    folder = tmp_path / "dlmc" / "net" / "magnitude_pruning" / "0.5"
    folder.mkdir(parents=True)
    (folder / "layer.smtx").write_text("3, 4, 6\n0 2 2 6\n1 3 0 1 2 3\n")
    return tmp_path / "dlmc"


def test_a_cell_is_timed_and_checked(
    spmm: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "cells.jsonl"
    given = ["--shapes", "64x96", "--sparsity", "0", "90", *SHORT, "--json", "--output", str(kept)]
    assert spmm.main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == kept.read_text().splitlines()
    dense, sparse = map(json.loads, lines)
    assert dense["layout"].startswith("packed_dense") and sparse["layout"].startswith("sell")
    assert (dense["sparsity"], sparse["sparsity"]) == (0, 90)
    for cell in (dense, sparse):
        assert (cell["shape"], cell["tokens"], cell["threads"]) == ([64, 96], 9, 1)
        assert set(cell["peers_us"]) == {"torch", "onnxruntime", "openvino"}
        assert cell["best_peer"] == min(cell["peers_us"], key=cell["peers_us"].get)
        assert 0 < cell["max_rel_error"] < 1e-5
        assert 0 < cell["us"]["lanes"] < 1e5
        operations = 2 * 64 * 96 * 9
        assert cell["gflops"] == pytest.approx(operations / cell["us"]["lanes"] / 1e3)
        for found in cell["speedup"].values():
            assert 0 < found["low"] <= found["median"] <= found["high"]


def test_patterns_of_an_archive_are_timed(
    spmm: ModuleType, patterns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "dlmc.tar.xz"
    with tarfile.open(archive, "w:xz") as file:
        file.add(patterns, ".")
    assert spmm.main(["--shapes", "--dlmc", str(archive), *SHORT, "--against", "torch"]) == 0
    shown = capsys.readouterr().out
    assert "3x4, 9 tokens, 1 thread; dense: torch" in shown
    assert "50% layer" in shown
    assert "of 1 cells are slower than dense" in shown


def test_a_wrong_result_fails_the_run(
    spmm: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spmm, "relative_error", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(spmm, "matmul_peers", lambda *_: {"none": FakePeer()})
    assert spmm.main(["--shapes", "8x40", "--sparsity", "0", *SHORT, "--json"]) == 1
    assert "1 cells exceed an error of" in capsys.readouterr().err


class FakePeer:
    def check(self, *_: object) -> None:
        pass

    def __call__(self) -> None:
        pass


def test_a_pattern_is_a_mask(spmm: ModuleType, patterns: Path) -> None:
    (pattern,) = spmm.dlmc.read(patterns)
    assert (pattern.model, pattern.sparsity, pattern.layer) == ("net", "0.5", "layer")
    expected = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(pattern.mask, expected.bool())


@pytest.mark.parametrize(
    "text",
    ["", "3, 4\n0 0 0 0\n", "3, 4, 2\n0 1 2\n0 1\n", "3, 4, 2\n0 2 1 2\n0 1\n", "1, 1, x\n0 1\n0"],
)
def test_a_damaged_pattern_is_refused(spmm: ModuleType, patterns: Path, text: str) -> None:
    (file,) = patterns.rglob("*.smtx")
    file.write_text(text)
    with pytest.raises(ValueError, match=r"layer\.smtx"):
        list(spmm.dlmc.read(patterns))


def test_a_folder_without_patterns_is_refused(spmm: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \*\.smtx file under"):
        list(spmm.dlmc.read(tmp_path))
