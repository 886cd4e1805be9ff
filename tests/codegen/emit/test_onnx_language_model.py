"""Language models exported to ONNX: their cache goes in and comes out."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

import sparsify
from sparsify.codegen.emit.onnx import export
from sparsify.passes import run_pipeline
from sparsify.report import Report
from tests.codegen.emit.test_onnx import error, run

onnx = pytest.importorskip("onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen2"])
def test_a_language_model_with_its_cache(tiny_lm: ModuleType, tmp_path: Path, name: str) -> None:
    programs = tiny_lm.portable_programs(name)
    for entry in programs:
        export(entry, Report(), tmp_path / f"{entry.name}.onnx")
        onnx.checker.check_model(tmp_path / f"{entry.name}.onnx", full_check=True)
    state = [v for v in programs["prefill"].user_inputs() if v.name in ("keys", "values")]
    keys, values = (torch.zeros([8 if not isinstance(n, int) else n for n in v.meta["val"].shape])
                    for v in state)  # fmt: skip
    here = (keys, values)
    pages = torch.tensor([[3, 1], [0, 5]], dtype=torch.int32)
    starts, counts = torch.zeros(2, dtype=torch.int64), torch.tensor([9, 4])
    ids = torch.randint(0, 61, (2, 9))
    for step in range(12):
        inputs = (ids, pages, starts, counts)
        expected = programs["prefill" if step == 0 else "decode"].run(*inputs, keys, values)
        expected = expected[0] if isinstance(expected, tuple) else expected
        # Prefill serves one token as well.
        entry = "prefill" if step % 2 == 0 else "decode"
        found, *here = run(tmp_path / f"{entry}.onnx", *inputs, *here)
        assert error(found, expected) <= 1e-4
        assert error(here[0], keys) <= 1e-4 and error(here[1], values) <= 1e-4
        starts, counts, ids = starts + counts, torch.ones_like(counts), torch.randint(0, 61, (2, 1))


def test_a_language_model_that_selects_what_it_reads(tiny_lm: ModuleType, tmp_path: Path) -> None:
    """Bounds of keys go in and come out beside the cache."""
    recipes = [
        sparsify.Quest(48, skip=(), bound_keys=4),
        sparsify.VerticalSlash(0.25, recent=0),
    ]
    programs = run_pipeline(tiny_lm.portable_programs("llama"), recipes).programs
    for entry in programs:
        export(entry, Report(), tmp_path / f"{entry.name}.onnx")
    state = tuple(
        torch.zeros([12 if not isinstance(n, int) else n for n in v.meta["val"].shape])
        for v in programs["decode"].state()
    )
    assert [tuple(s.shape[2:]) for s in state] == [(2, 6, 16), (2, 16, 6), (2, 2, 6, 4)]
    here = state
    pages = torch.randperm(12, dtype=torch.int32).view(2, 6)
    starts, counts = torch.zeros(2, dtype=torch.int64), torch.tensor([83, 70])
    ids = torch.randint(0, 61, (2, 83))
    for entry in ("prefill", "decode", "decode", "decode"):
        inputs = (ids, pages, starts, counts)
        keys, values, bounds = state
        expected = programs[entry].run(*inputs, keys, values, bounds=bounds)
        found, *here = run(tmp_path / f"{entry}.onnx", *inputs, *here)
        assert error(found, expected) <= 1e-4
        assert all(error(new, own) <= 1e-4 for new, own in zip(here, state, strict=True))
        starts, counts, ids = starts + counts, torch.ones_like(counts), torch.randint(0, 61, (2, 1))
