"""Manifests of saved models that are damaged, foreign or odd are refused, naming what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sparsify
from sparsify.artefact.container import ArtefactError

from .conftest import CompiledModel, changed


@pytest.fixture(scope="module")
def saved(assembled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "small.sparsify"
    assembled.save(path)
    return path


def test_a_damaged_manifest(saved: Path, tmp_path: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[data.index(b'"format_version"') + 3] ^= 1
    path = tmp_path / "damaged"
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match="truncated, or no file of sparsify"):
        sparsify.load(path)


@pytest.mark.parametrize(
    ("version", "remedy"), [(99, "install a newer sparsify"), (1, "compile and save the model")]
)
def test_another_format_version(saved: Path, tmp_path: Path, version: int, remedy: str) -> None:
    def other(manifest: dict[str, Any], parts: dict[str, bytes]) -> None:
        manifest["format_version"] = version

    path = changed(saved, tmp_path / "f", other)
    with pytest.raises(ArtefactError, match=rf"format version {version}, .* reads 2; {remedy}"):
        sparsify.load(path)


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        ((), "about", None),
        ((), "parts", []),
        (("parts", "weights.safetensors"), "bytes", "many"),
        (("about",), "target", 3),
        (("about",), "versions", None),
        (("about",), "features", None),
        (("about",), "num_threads", "two"),
        (("about",), "text", []),
        (("about", "entries", "forward"), "regions", []),
    ],
)
@pytest.mark.parametrize("trusted", [True, False])
def test_a_manifest_with_an_odd_field(
    saved: Path, tmp_path: Path, where: tuple[str, ...], field: str, value: object, trusted: bool
) -> None:
    def odd(manifest: dict[str, Any], parts: dict[str, bytes]) -> None:
        record = manifest
        for name in where:
            record = record[name]
        if value is None:
            del record[field]
        else:
            record[field] = value

    path = changed(saved, tmp_path / "odd.sparsify", odd)
    with pytest.raises(ArtefactError, match=rf"cannot load .*odd\.sparsify: .*'{field}'"):
        sparsify.load(path, trusted=trusted)


@pytest.mark.parametrize("report", [{}, {"target": "x", "facts": {}, "decisions": [{}]}])
def test_a_report_that_cannot_be_read(saved: Path, tmp_path: Path, report: dict[str, Any]) -> None:
    def odd(manifest: dict[str, Any], parts: dict[str, bytes]) -> None:
        manifest["about"]["report"] = report

    path = changed(saved, tmp_path / "odd.sparsify", odd)
    with pytest.raises(ArtefactError, match=r"odd\.sparsify: its report cannot be read"):
        sparsify.load(path, trusted=True)


def test_odd_text_settings(saved: Path, tmp_path: Path) -> None:
    def odd(manifest: dict[str, Any], parts: dict[str, bytes]) -> None:
        manifest["about"]["text"] = {"max_positions": "many"}

    path = changed(saved, tmp_path / "odd.sparsify", odd)
    with pytest.raises(ArtefactError, match=r"cannot load .*odd\.sparsify: .*'max_positions'"):
        sparsify.load(path)
