"""The compile cache: hits only for the same compilation, safe and bounded."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsify
from sparsify import cache
from sparsify.artefact.compilation import Compilation
from sparsify.compiled import CompiledModel
from sparsify.frontend.torch import capture

from .conftest import Small, assemble, examples


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(directory: Path) -> list[Path]:
    return sorted((directory / "compiled").glob("*.sparsify"))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, 4).eval()


def test_the_second_compilation_comes_from_the_cache(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = linear(), torch.randn(3, 8)
    first = sparsify.compile(model, (x,))
    assert first.report.facts["cached"] is False
    assert len(entries(directory)) == 1

    def fail(*_: Any) -> None:
        raise AssertionError("a hit needs no decomposition")

    monkeypatch.setattr("sparsify.compiler.normalise", fail)
    second = sparsify.compile(copy.deepcopy(model), (x,))
    assert second.report.facts["cached"] is True
    assert torch.equal(second(x), first(x))
    assert second.report.decisions == first.report.decisions


def test_it_can_be_switched_off(directory: Path) -> None:
    for _ in range(2):
        model = sparsify.compile(linear(), (torch.randn(3, 8),), cache=False)
        assert model.report.facts["cached"] is False
    assert entries(directory) == []


def test_a_damaged_entry_is_ignored(directory: Path, assembled: CompiledModel) -> None:
    assert cache.keep("a", assembled._compilation) is None
    [entry] = entries(directory)
    whole = entry.read_bytes()
    assert cache.find("a") is not None
    for data in (b"", whole[:1000], whole[:-100], whole.replace(b"aten", b"atem")):
        entry.write_bytes(data)
        assert cache.find("a") is None
    entry.unlink()
    assert cache.find("a") is None


def test_an_entry_of_another_user_is_built_again(directory: Path) -> None:
    x = torch.randn(3, 8)
    sparsify.compile(linear(), (x,))
    [entry] = entries(directory)
    before = entry.read_bytes()
    (directory / "key").write_bytes(bytes(32))
    model = sparsify.compile(linear(), (x,))
    assert model.report.facts["cached"] is False
    torch.testing.assert_close(model(x), linear()(x))
    assert entry.read_bytes() != before


def test_a_directory_that_cannot_be_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path / "file"))
    model = sparsify.compile(linear(), (torch.randn(3, 8),))
    assert "file" in model.report.facts["not_cached"]


def key(model: nn.Module, *inputs: torch.Tensor, options: str = "", **shapes: Any) -> str:
    return cache.key_of({"forward": capture(model, inputs, **shapes)}, options)


def with_weight(value: float) -> nn.Module:
    model = linear()
    model.weight.data[0, 0] = value
    return model


class Scaled(nn.Linear):
    def __init__(self, factor: float) -> None:
        torch.manual_seed(0)
        super().__init__(8, 4)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


@pytest.mark.parametrize(
    "other",
    [
        lambda x: key(with_weight(7.0), x),
        lambda x: key(linear(), x, options="another target"),
        lambda x: key(linear(), torch.randn(100, 8)),
        lambda x: key(linear(), x, dynamic_shapes=None),
        lambda x: key(linear(), torch.randn(3, 2, 8)),
        lambda x: key(nn.Linear(8, 4, bias=False), x),
        lambda x: key(Scaled(2.0), x),
    ],
    ids=["weight", "options", "hint", "static", "rank", "bias", "constant"],
)
def test_whatever_changes_the_result_changes_the_key(
    other: Callable[[torch.Tensor], str],
) -> None:
    x = torch.randn(3, 8)
    assert key(linear(), x) == key(linear(), torch.randn(3, 8))
    assert other(x) != key(linear(), x)


def test_constants_in_the_graph_are_part_of_the_key() -> None:
    x = torch.randn(3, 8)
    assert key(Scaled(2.0), x) == key(Scaled(2.0), x)
    assert key(Scaled(2.0), x) != key(Scaled(2.5), x)


def test_the_entry_used_longest_ago_goes_first(
    directory: Path, assembled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilation = assembled._compilation
    for i, name in enumerate(("a", "b", "c")):
        assert cache.keep(name, compilation) is None
        path = directory / "compiled" / f"{name}.sparsify"
        os.utime(path, (1000 + i, 1000 + i))
    assert cache.find("a") is not None
    monkeypatch.setenv("SPARSIFY_CACHE_BYTES", str(3 * path.stat().st_size + 100))
    cache.keep("d", compilation)
    assert [entry.stem for entry in entries(directory)] == ["a", "c", "d"]


def test_what_killed_processes_left_is_swept(directory: Path, assembled: CompiledModel) -> None:
    folder = directory / "compiled"
    folder.mkdir(parents=True)
    old, new = folder / ".x.sparsify.old", folder / ".y.sparsify.new"
    old.write_text("")
    new.write_text("")
    os.utime(old, (time.time() - 10**6,) * 2)
    cache.keep("a", assembled._compilation)
    assert not old.exists() and new.exists()


def test_two_processes_may_write_the_same_entry(
    directory: Path, small: Small, tmp_path: Path
) -> None:
    model = assemble(small, examples())
    model.save(tmp_path / "model.sparsify")
    code = """
import sys
from sparsify import cache
from sparsify.artefact.files import Contents
compilation = Contents.open(sys.argv[1], trusted=True).compilation()
for _ in range(3):
    assert cache.keep("shared", compilation) is None
    assert cache.find("shared") is not None
"""
    command = [sys.executable, "-c", code, str(tmp_path / "model.sparsify")]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    found = cache.find("shared")
    assert isinstance(found, Compilation)
    assert [p.name for p in (directory / "compiled").iterdir()] == ["shared.sparsify"]
