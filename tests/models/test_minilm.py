"""The real MiniLM from end to end: one compiled model for all batches and sequence lengths."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify.compiled import CompiledModel

TOLERANCE = 2e-5
"""Of the output's scale, against float64."""


@pytest.fixture(scope="module")
def pruned(minilm: nn.Module) -> nn.Module:
    model = copy.deepcopy(minilm)
    model.encoder = sparsify.prune(model.encoder, sparsify.Unstructured(0.9))
    return model


@pytest.fixture(scope="module")
def exact(pruned: nn.Module) -> nn.Module:
    return copy.deepcopy(pruned).double()


@pytest.fixture(scope="module")
def compiled(pruned: nn.Module) -> CompiledModel:
    return sparsify.compile(pruned, tokens(1, 128, 128), num_threads=2)


def tokens(batch: int, length: int, shortest: int) -> dict[str, torch.Tensor]:
    """Random tokens in sentences of ``shortest`` tokens and more."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    ids = torch.randint(0, 30522, (batch, length), generator=generator)
    ends = torch.randint(shortest, length + 1, (batch, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < ends).long()}


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize(
    ("batch", "length"),
    [
        *[(1, 1), (1, 2), (1, 15), (1, 16), (1, 17), (1, 128), (1, 511), (1, 512)],
        *[(2, 1), (2, 40), (3, 7), (5, 33), (8, 128), (15, 3), (16, 1), (16, 64)],
    ],
)
def test_every_shape_is_right(
    compiled: CompiledModel, exact: nn.Module, batch: int, length: int
) -> None:
    inputs = tokens(batch, length, shortest=max(1, length // 2))
    with torch.no_grad():
        expected = exact(**inputs)
    found = compiled(**inputs)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    for name in expected:
        assert error(found[name], expected[name]) <= TOLERANCE, name


def test_the_whole_model_is_one_compiled_region(compiled: CompiledModel) -> None:
    assert [region.kind for region in compiled.plan.regions] == ["compiled"]
    assert compiled.report.fallbacks == ()


def test_every_encoder_layer_is_sparse(compiled: CompiledModel) -> None:
    final = {d.site: d for d in compiled.report.final() if d.site.startswith("encoder.")}
    assert len(final) == 6 * 4
    assert {d.verdict for d in final.values()} == {"sparse"}


def test_encoder_weights_take_at_most_a_quarter_of_dense(
    compiled: CompiledModel, pruned: nn.Module, tmp_path: Path
) -> None:
    """In memory and in the file; the rest of the model is as large as before."""
    matrices = [p for n, p in pruned.encoder.named_parameters() if p.dim() == 2]
    dense = sum(p.nbytes for p in matrices)
    rest = sum(p.nbytes for p in pruned.parameters()) - dense
    assert compiled.nbytes - rest <= dense / 4
    compiled.save(tmp_path / "minilm.sparsify")
    overhead = 2 << 20  # graphs and kernels
    assert (tmp_path / "minilm.sparsify").stat().st_size - rest <= dense / 4 + overhead


def test_a_second_compilation_runs_no_pass(
    compiled: CompiledModel, pruned: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a compilation from the cache got this far")

    monkeypatch.setattr("sparsify.compiler.normalise", refused)
    monkeypatch.setattr("sparsify.codegen.build.compile_library", refused)
    again = sparsify.compile(pruned, tokens(1, 128, 128), num_threads=2)
    assert again.report.facts["cached"] is True


def test_a_fresh_process_gets_the_same(compiled: CompiledModel, tmp_path: Path) -> None:
    inputs = tokens(3, 20, 5)
    compiled.save(tmp_path / "minilm.sparsify")
    torch.save((inputs, tuple(compiled(**inputs).values())), tmp_path / "expected.pt")
    code = """
import sys, torch, sparsify
inputs, expected = torch.load(sys.argv[2])
found = sparsify.load(sys.argv[1])(**inputs)
print(type(found).__name__, all(map(torch.equal, found.values(), expected)))
"""
    paths = [str(tmp_path / "minilm.sparsify"), str(tmp_path / "expected.pt")]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "True"
    assert done.stdout.startswith("BaseModelOutput")
