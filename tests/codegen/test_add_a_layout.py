"""The worked example of docs/add-a-layout.md, run as it stands there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify.codegen import registry
from sparsify.layouts import parse
from sparsify.layouts.base import LAYOUTS
from sparsify.passes import PORTABLE
from sparsify.passes.propagate_lanes import PropagateLanes
from sparsify.passes.select_layout import SelectLayout

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "add-a-layout.md"


@pytest.fixture
def ternary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs the document's first block of code, and forgets afterwards what it registered."""
    registry.all_linear_kernels()
    monkeypatch.setattr(registry, "_LINEAR", dict(registry._LINEAR))
    block = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert block is not None
    with LAYOUTS.scope():
        exec(compile(block[1], str(DOCUMENT), "exec"), {"__name__": "ternary"})
        yield


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_model_is_compiled_with_it(ternary: None, tokens: int) -> None:
    """With few tokens as they are, with many between conversions from and to lanes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 20), nn.SiLU(), nn.Linear(20, 7)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.randint(-1, 2, layer.weight.shape))
    x = torch.randn(tokens, 33)
    passes = (*PORTABLE, SelectLayout(layout="ternary"), PropagateLanes())
    compiled = sparsify.compile(model, (x,), passes=passes)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-4)
    chosen = [d.layout for d in compiled.report.decisions if d.made_by == "select_layout"]
    assert chosen == ["ternary", "ternary"]


def test_a_weight_that_is_not_ternary_is_refused(ternary: None) -> None:
    layout = parse("ternary")
    weight = torch.tensor([[1.0, -1.0, 0.0]])
    packed = layout.pack(weight)
    layout.validate(packed, (1, 3))
    assert torch.equal(layout.unpack(packed, (1, 3)), weight)
    with pytest.raises(ValueError, match="other than -1, 0 and 1"):
        layout.pack(2 * weight)
