"""The worked example of docs/add-a-gate.md, run as it stands there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsify
from sparsify import ops
from sparsify.codegen import gates as kernels
from sparsify.codegen.kernels import cpu
from sparsify.gates import GATES, parse

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "add-a-gate.md"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Runs the document's first block of code, and forgets afterwards what it registered."""
    assert cpu.gate_rules
    monkeypatch.setattr(kernels, "_KERNELS", dict(kernels._KERNELS))
    block = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert block is not None
    defined: dict[str, Any] = {"__name__": "relative"}
    with GATES.scope():
        exec(compile(block[1], str(DOCUMENT), "exec"), defined)
        yield defined


def test_a_model_is_compiled_with_it(example: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 20), nn.SiLU(), nn.Linear(20, 7)).eval()
    batches = [torch.randn(40, 33)]
    recipe = example["RelativeInputs"](0.5, sparsify.Calibration(batches))
    compiled = sparsify.compile(
        model, (torch.randn(3, 33),), recipe=recipe, cache=False, num_threads=1
    )
    assert compiled.report.fallbacks == ()
    decisions = [d for d in compiled.report.decisions if d.made_by == "relative_inputs"]
    rules = [d.reason.partition(":")[0] for d in decisions]
    assert [d.site for d in decisions] == ["0", "2"]
    for tokens in (3, 40):
        x = torch.randn(tokens, 33)
        with torch.no_grad():
            hidden = model[1](model[0](torch.where(parse(rules[0]).keep(x), x, 0)))
            expected = model[2](torch.where(parse(rules[1]).keep(hidden), hidden, 0))
        same = torch.isclose(compiled(x), expected, atol=1e-5, rtol=1e-5).all(-1)
        assert same.float().mean() >= 0.9
    assert all(d.density == pytest.approx(0.5, abs=0.02) for d in decisions)


def test_kernels_equal_the_reference_in_both_forms(example: dict[str, Any]) -> None:
    model = nn.Linear(9, 3).eval()

    class Gated(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = torch.ops.sparsify.gate(x, "relative{permille=400}", [])
            return found

    for tokens in (1, 5, 40):
        x = torch.randn(tokens, 9)
        compiled = sparsify.compile(
            nn.Sequential(Gated(), model), (x,), dynamic_shapes=None, cache=False, num_threads=1
        )
        expected = model(ops.gate.reference(x, "relative{permille=400}", []))
        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
        assert compiled.report.fallbacks == ()


def test_without_kernels_it_stays_with_pytorch(
    example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_KERNELS", {})
    model = nn.Linear(33, 20).eval()
    x = torch.randn(3, 33)
    recipe = example["RelativeInputs"](0.5, sparsify.Calibration([torch.randn(40, 33)]))
    compiled = sparsify.compile(model, (x,), recipe=recipe, cache=False, num_threads=1)
    (fallback,) = compiled.report.fallbacks
    assert "has no kernel" in fallback.reason and "relative" in fallback.reason
    assert compiled(x).shape == (3, 20)
