"""The worked example of docs/add-an-attention-pattern.md, compiled and exported as it stands."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsify
from sparsify import Calibration, PatternAttention

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "add-an-attention-pattern.md"
HEADS, BLOCK = 2, 64


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1])
        return x + self.attention(x, at <= at[:, None])


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """What the document's two blocks of code define."""
    torch.manual_seed(0)
    model, inputs = Model().eval(), (torch.randn(2, 300, 32),)
    names = {
        "__name__": "butterfly",
        "sparsify": sparsify,
        "PatternAttention": PatternAttention,
        "Calibration": Calibration,
        "model": model,
        "inputs": inputs,
        "batches": [torch.randn(1, 700, 32)],
    }
    pattern, use = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    for block in (pattern, use):
        exec(compile(block, str(DOCUMENT), "exec"), names)
    return names


def expected(example: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    at = torch.arange(x.shape[1])
    place = at // BLOCK
    differ = place[:, None] ^ place
    kept = (differ == 0) | (differ == 1) | (differ == 2) | (differ == 4)
    with torch.no_grad():
        y: torch.Tensor = x + example["model"].attention(x, kept & (at <= at[:, None]))
    return y


def test_the_compiled_model_reads_what_the_pattern_keeps(example: dict[str, Any]) -> None:
    compiled = example["compiled"]
    assert compiled.report.fallbacks == ()
    for batch, length in ((1, 1), (2, 63), (1, 64), (3, 65), (1, 700)):
        x = torch.randn(batch, length, 32)
        torch.testing.assert_close(compiled(x), expected(example, x), atol=1e-5, rtol=1e-5)


def test_the_report_tells_what_it_costs(example: dict[str, Any]) -> None:
    site, *heads = [d for d in example["compiled"].report if d.made_by == "pattern_attention"]
    assert site.site == "attention" and "butterfly(digits=3)" in site.reason
    assert [d.site for d in heads] == [f"attention.head{h}" for h in range(HEADS)]
    assert all(0 < d.density < 1 and 0 < d.mass < 1 and d.error > 0 for d in heads)


def test_the_exported_file_computes_the_same(example: dict[str, Any], tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    example["compiled"].export_onnx(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [i.name for i in session.get_inputs()]
    for batch, length in ((1, 1), (2, 129)):
        x = torch.randn(batch, length, 32)
        (found,) = session.run(None, {name: x.numpy()})
        np.testing.assert_allclose(found, expected(example, x).numpy(), atol=1e-5, rtol=1e-5)
