"""Saved models: exact again in a fresh process, refused when anything is wrong with the file."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import sparsify
from sparsify.artefact.container import ArtefactError, Container
from sparsify.artefact.files import Contents
from sparsify.artefact.graphs import SavedProgram, checked
from sparsify.artefact.weights import read, written
from sparsify.compiled import CompiledModel
from sparsify.report import Notice

from .conftest import Small, assemble, changed, examples, in_eager


@pytest.fixture(scope="module")
def compiled(small: Small) -> CompiledModel:
    return sparsify.compile(small, examples(), num_threads=1)


@pytest.fixture(scope="module")
def saved(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "small.sparsify"
    compiled.save(path)
    return path


def run_elsewhere(code: str, *arguments: object, **environment: str) -> str:
    """Runs code in a fresh process; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_loaded_model_computes_the_same(compiled: CompiledModel, saved: Path) -> None:
    loaded = sparsify.load(saved)
    inputs = examples(2, 9)
    for name, tensor in compiled(**inputs).items():
        assert torch.equal(loaded(**inputs)[name], tensor)
    assert loaded.report.decisions == compiled.report.decisions
    assert loaded.graph == compiled.graph
    assert repr(loaded) == repr(compiled)


def test_parameters_of_gates_are_stored_too(tmp_path: Path) -> None:
    module, x = torch.nn.Linear(24, 16).eval(), torch.randn(3, 24)
    compiled = sparsify.compile(
        module, (x,), recipe=sparsify.Wina(0.5, sparsify.Calibration([torch.randn(40, 24)]))
    )
    compiled.save(tmp_path / "gated.sparsify")
    torch.testing.assert_close(sparsify.load(tmp_path / "gated.sparsify")(x), compiled(x))


def test_a_loaded_model_saves_the_same_file(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.sparsify"
    sparsify.load(saved).save(again)
    assert Container(again).digests == Container(saved).digests


def test_a_fresh_process_loads_it(compiled: CompiledModel, saved: Path, tmp_path: Path) -> None:
    inputs = examples(2, 9)
    torch.save((inputs, compiled(**inputs)), tmp_path / "expected.pt")
    code = """
import sys, torch, sparsify
inputs, expected = torch.load(sys.argv[2])
found = sparsify.load(sys.argv[1])(**inputs)
print(all(torch.equal(found[name], expected[name]) for name in expected))
"""
    assert run_elsewhere(code, saved, tmp_path / "expected.pt").strip() == "True"


def test_output_types_of_transformers_are_imported(tmp_path: Path) -> None:
    from transformers.modeling_outputs import BaseModelOutput

    class Hugging(nn.Module):
        def forward(self, x: torch.Tensor) -> BaseModelOutput:
            return BaseModelOutput(last_hidden_state=x * 2)

    path = tmp_path / "hugging.sparsify"
    sparsify.compile(Hugging(), (torch.randn(3, 4),)).save(path)
    code = """
import sys, torch, sparsify
assert "transformers" not in sys.modules
found = sparsify.load(sys.argv[1])(torch.ones(2, 4))
print(type(found).__name__, float(found.last_hidden_state.sum()))
"""
    assert run_elsewhere(code, path).split() == ["BaseModelOutput", "16.0"]


def test_types_that_cannot_be_imported_are_named(assembled: CompiledModel) -> None:
    data = SavedProgram.of(assembled.portable).data()
    renamed = data.replace(b"builtins.dict", b"absent_package.Output")
    assert renamed != data
    with pytest.raises(ArtefactError, match=r"absent_package\.Output.*install it"):
        checked(renamed, "forward", trusted=True)
    with pytest.raises(ArtefactError, match="import absent_package before loading"):
        checked(renamed, "forward", trusted=False)


def test_output_types_without_a_name_cannot_be_saved(tmp_path: Path) -> None:
    class Result:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

    torch.utils._pytree.register_pytree_node(
        Result, lambda r: ([r.x], None), lambda leaves, _: Result(*leaves)
    )

    class Local(nn.Module):
        def forward(self, x: torch.Tensor) -> Result:
            return Result(x + 1)

    model = sparsify.compile(Local(), (torch.randn(3, 4),))
    assert type(model(torch.ones(2, 4))) is Result
    assert "serialized_type_name" in model.report.facts["not_cached"]
    with pytest.raises(ArtefactError, match="register it with a serialized_type_name"):
        model.save(tmp_path / "local.sparsify")
    assert list(tmp_path.iterdir()) == []


def test_weights_are_stored_once_in_canonical_form(saved: Path, small: Small) -> None:
    contents = Contents.open(saved, trusted=False)
    weights = read(contents.container.part("weights.safetensors"))
    tables = [t for t in weights.values() if t.shape == small.table.weight.shape]
    assert len(tables) == 1 and torch.equal(tables[0], small.table.weight)
    assert weights["up.weight:csr.columns"].dtype == torch.int16
    assert weights["up.weight:csr.values"].numel() == small.up.weight.count_nonzero()
    assert not any("sell" in name or "panels" in name for name in weights)


def test_the_weights_are_a_safetensors_file_that_can_be_mapped(saved: Path, tmp_path: Path) -> None:
    data = Container(saved).part("weights.safetensors")
    part = tmp_path / "weights.safetensors"
    part.write_bytes(data)
    ours = read(data)
    with safe_open(part, "pt") as theirs:
        assert set(theirs.keys()) == set(ours)
        for name in ours:
            assert torch.equal(theirs.get_tensor(name), ours[name])
    assert saved.read_bytes().index(data) % 64 == 0


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(7, dtype=torch.int16),
        torch.tensor(3.5),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.randn(3, 4).t(),
        torch.tensor([2**40]),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_any_tensor_survives_the_file(tensor: torch.Tensor) -> None:
    data = b"".join(bytes(chunk) for chunk in written({"a": tensor, "b": torch.ones(5)}))
    back = read(memoryview(data))
    assert back["a"].dtype == tensor.dtype
    assert torch.equal(back["a"], tensor)
    assert torch.equal(back["b"], torch.ones(5))


def test_programs_survive_without_paths_of_the_machine(assembled: CompiledModel) -> None:
    program = assembled._compilation.specialised["forward"]
    data = SavedProgram.of(program).data()
    assert str(Path(__file__).parent).encode() not in data
    back = checked(data, "forward", trusted=False).program(program.weights)
    assert str(back.graph) == str(program.graph)
    assert [str(v) for v in back.exported.range_constraints.items()] == [
        str(v) for v in program.exported.range_constraints.items()
    ]
    for old, new in zip(program.graph.nodes, back.graph.nodes, strict=True):
        if isinstance(old.meta.get("val"), torch.Tensor):
            assert new.meta["val"].dtype == old.meta["val"].dtype
            assert str(new.meta["val"].shape) == str(old.meta["val"].shape)


def test_a_plan_of_several_regions_survives(small: Small, tmp_path: Path) -> None:
    def unsupported(node: torch.fx.Node) -> str | None:
        return "no kernel" if "embedding" in str(node.target) else None

    model = assemble(small, examples(), unsupported=unsupported)
    model.save(tmp_path / "regions.sparsify")
    loaded = in_eager(Contents.open(tmp_path / "regions.sparsify", trusted=True).compilation())
    assert [r.kind for r in loaded.plan.regions] == [r.kind for r in model.plan.regions]
    inputs = examples(4, 3)
    assert torch.equal(loaded(**inputs)["logits"], model(**inputs)["logits"])


# Refusals.


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot load .*absent: there is no such file"):
        sparsify.load(tmp_path / "absent")


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF" + bytes(100)])
def test_a_foreign_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"is no file of sparsify|is empty"):
        sparsify.load(path)


def test_another_zip_file(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "model.pt")
    with pytest.raises(ArtefactError, match="no file of sparsify"):
        sparsify.load(tmp_path / "model.pt")


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_a_truncated_file(saved: Path, tmp_path: Path, fraction: float) -> None:
    data = saved.read_bytes()
    path = tmp_path / "short"
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ArtefactError, match="truncated"):
        sparsify.load(path)


@pytest.mark.parametrize(
    "part",
    ["portable/forward.json", "specialised/forward.json", "weights.safetensors", "kernels.so"],
)
def test_a_damaged_part(saved: Path, tmp_path: Path, part: str) -> None:
    data = bytearray(saved.read_bytes())
    middle = data.index(bytes(Container(saved).part(part))) + 100
    data[middle] ^= 1
    path = tmp_path / "damaged"
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match=rf"the part '{part}' is damaged.*SHA-256"):
        contents = Contents.open(path, trusted=True)
        contents.compilation()
        contents.portable()


def test_a_missing_part(saved: Path, tmp_path: Path) -> None:
    path = changed(saved, tmp_path / "f", lambda manifest, parts: parts.pop("kernels.so") and None)
    with pytest.raises(ArtefactError, match=r"the part 'kernels\.so' is missing"):
        sparsify.load(path, trusted=True)


def test_a_missing_cpu_feature(saved: Path, tmp_path: Path) -> None:
    def demanding(manifest: dict[str, Any], parts: dict[str, bytes]) -> None:
        manifest["about"]["features"].append("avx1024")

    path = changed(saved, tmp_path / "f", demanding)
    with pytest.raises(RuntimeError, match=r"CPU features avx1024.*target='native'"):
        sparsify.load(path, trusted=True)


def test_weights_that_contradict_themselves() -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(4)
    with pytest.raises(ArtefactError, match="do not hold a tensor"):
        read(memoryview(data))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"torch.ops.aten.relu.default", b"torch.hub.load", "'torch.hub.load', which is no op"),
        (b"torch.ops.aten.relu.default", b"torch.ops.aten.from_file.default", "no operator of"),
        (b"torch.ops.aten.relu.default", b"_operator.attrgetter", "no operator of a model"),
        (b"Symbol('", b"__import__('os').system('true') or Symbol('", "is no size"),
    ],
)
def test_graphs_that_would_run_code_are_refused(old: bytes, new: bytes, message: str) -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

    data = SavedProgram.of(assemble(Plain(), (torch.randn(3, 4),)).portable).data()
    assert old in data
    with pytest.raises(ArtefactError, match=message):
        checked(data.replace(old, new), "forward", trusted=True)


# Trust.


def test_a_file_of_another_user_is_built_again(
    compiled: CompiledModel, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path / "another"))
    inputs = examples(2, 9)
    expected = compiled(**inputs)
    with pytest.warns(Notice, match="built again, it was not saved by this user"):
        loaded = sparsify.load(saved)
    for name in expected:
        torch.testing.assert_close(loaded(**inputs)[name], expected[name])
    assert loaded.report.facts["cached"] is False
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert sparsify.load(saved, trusted=False).report.facts["cached"] is True


def test_a_changed_manifest_is_not_ours(saved: Path, tmp_path: Path) -> None:
    def other(manifest: dict[str, Any], parts: dict[str, bytes]) -> None:
        manifest["about"]["num_threads"] = 2

    assert Contents.open(saved, None).trusted
    assert not Contents.open(changed(saved, tmp_path / "f", other), None).trusted


def test_kernels_of_another_tvm_are_built_again(saved: Path, tmp_path: Path) -> None:
    def older(manifest: dict[str, Any], parts: dict[str, bytes]) -> None:
        manifest["about"]["versions"]["tvm"] = "0.1"

    path = changed(saved, tmp_path / "f", older)
    with pytest.warns(UserWarning, match=r"built again, it was built with tvm 0\.1"):
        loaded = sparsify.load(path, trusted=True)
    assert loaded(**examples())["logits"].shape == (3, 5, 24)


@pytest.mark.isa("x86-avx2")
def test_a_file_is_built_for_another_target(compiled: CompiledModel, saved: Path) -> None:
    loaded = sparsify.load(saved, target="x86-avx2")
    assert loaded.report.target == "x86-avx2"
    inputs = examples(2, 9)
    for name, tensor in compiled(**inputs).items():
        torch.testing.assert_close(loaded(**inputs)[name], tensor, rtol=1e-5, atol=1e-5)
