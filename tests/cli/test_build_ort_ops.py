"""sparsify build-ort-ops."""

import json
from pathlib import Path

import pytest

from sparsify.codegen.emit import ort_ops


def test_it_writes_the_library_that_was_asked_for(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def build(path: Path, target) -> None:
        asked.append(target.name)
        path.write_bytes(b"code")

    monkeypatch.setattr(ort_ops, "build", build)
    path = tmp_path / "ops.so"
    done = cli("build-ort-ops", "--target", "x86-avx2", "-o", str(path), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"output": str(path), "target": "x86-avx2", "bytes": 4}
    assert asked == ["x86-avx2"]


def test_a_missing_folder_is_told_before_anything_is_compiled(cli, tmp_path: Path) -> None:
    done = cli("build-ort-ops", "-o", str(tmp_path / "no" / "ops.so"))
    assert done.exit_code == 2
    assert "no such folder to write into" in done.output


def test_a_target_of_another_kind_is_refused(cli, tmp_path: Path) -> None:
    done = cli("build-ort-ops", "--target", "arm64-neon", "-o", str(tmp_path / "ops.so"))
    assert done.exit_code != 0
    assert "x86-64 alone" in done.output
