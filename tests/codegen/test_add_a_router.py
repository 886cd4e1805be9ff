"""The worked example of docs/add-a-router.md, run as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsify
from sparsify.codegen.kernels.cpu import route
from sparsify.routers import ROUTERS, parse

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "add-a-router.md"
SPEC = "comparable{percent=30}"


class Routed(nn.Module):
    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found: Any = torch.ops.sparsify.route(logits * 2, SPEC, [])
        return tuple(found)


def compiled(**options: Any) -> Any:
    shapes = ({0: torch.export.Dim.AUTO},)
    x = torch.randn(9, 6)
    return sparsify.compile(Routed(), (x,), dynamic_shapes=shapes, cache=False, **options)


def check(fast: Any) -> None:
    logits = torch.randn(40, 6)
    shares = (logits * 2).softmax(-1)
    experts, weights = fast(logits)
    for token, share in enumerate(shares):
        wanted = {e for e in range(6) if share[e] >= 0.3 * share.max()}
        assert {e for e in experts[token].tolist() if e >= 0} == wanted
        torch.testing.assert_close(weights[token].sum(), share[list(wanted)].sum())


def test_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    router, rule, _ = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    route.rule_of(parse("top_k{k=1}"))  # ours are registered
    monkeypatch.setattr(route, "_RULES", dict(route._RULES))
    names: dict[str, Any] = {"__name__": "comparable"}
    with ROUTERS.scope():
        exec(compile(router, str(DOCUMENT), "exec"), names)
        by_pytorch = compiled()
        reasons = " ".join(d.reason for d in by_pytorch.report.fallbacks)
        assert f"router {SPEC} has no kernel, only its reference" in reasons
        check(by_pytorch)
        exec(compile(rule, str(DOCUMENT), "exec"), names)
        check(compiled(strict=True))
