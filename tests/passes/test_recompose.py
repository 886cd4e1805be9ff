"""Operators that are spelled out become one, and what only looks like them does not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsify.passes.canonicalize import Canonicalize
from sparsify.passes.fold_constants import FoldConstants
from sparsify.passes.fuse_attention import FuseAttention
from sparsify.passes.recompose import Recompose

PASSES = (Canonicalize(), FoldConstants(), Recompose())
INPUTS = [(torch.randn(b, s, 6),) for b, s in ((1, 1), (3, 17))]


class Block(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.linear = nn.Linear(6, 6, bias=False)
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


def run(body, import_model, apply, same_results, targets):
    model = Block(body)
    result = apply(import_model(model, torch.randn(2, 5, 6)), *PASSES)
    same_results(model, result.programs["forward"], INPUTS)
    return targets(result.programs["forward"])


def erf_gate(x: torch.Tensor) -> torch.Tensor:
    return torch.erf(x / math.sqrt(2)) + 1


def normal(x: torch.Tensor, root=lambda v: torch.sqrt(v), keep: bool = True) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / root((centred**2).mean(-1, keepdim=keep) + 1e-5)


@pytest.mark.parametrize(
    ("body", "operator"),
    [
        (lambda m, x: m.linear(x) + m.b, "linear"),
        (lambda m, x: m.b + m.linear(x), "linear"),
        (lambda m, x: x * erf_gate(x) * 0.5, "gelu"),
        (lambda m, x: x * 0.5 * erf_gate(x), "gelu"),
        (lambda m, x: x * (erf_gate(x) * 0.5), "gelu"),
        (lambda m, x: 0.5 * (x * (1 + torch.erf(x * 0.70710678))), "gelu"),
        (lambda m, x: x * torch.sigmoid(x), "silu"),
        (lambda m, x: x * (x + 3).clamp(0, 6) / 6, "hardswish"),
        (lambda m, x: x * F.hardsigmoid(x), "hardswish"),
        (lambda m, x: normal(x) * m.w + m.b, "layer_norm"),
        (lambda m, x: m.b + m.w * normal(x), "layer_norm"),
    ],
)
def test_forms(body, operator, import_model, apply, same_results, targets) -> None:
    found = run(body, import_model, apply, same_results, targets)
    assert dict(found) == {operator: 1}


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.linear(x) + x,
        lambda m, x: x * erf_gate(x) * 0.6,
        lambda m, x: x * (torch.erf(x / 1.5) + 1) * 0.5,
        lambda m, x: (x + 1) * erf_gate(x) * 0.5,
        lambda m, x: x * torch.sigmoid(2 * x),
        lambda m, x: x * x.shape[1] ** 0.5 * torch.sigmoid(x),  # a number of the run time
        lambda m, x: x * (x + 3).clamp(0, 5) / 6,
        lambda m, x: (x - x.mean(1, keepdim=True)) / x.std(-1, keepdim=True) * m.w + m.b,
        lambda m, x: (normal(x) + 1) * m.w + m.b,
    ],
)
def test_look_alikes_stay(body, import_model, apply, same_results, targets) -> None:
    before = set(targets(import_model(Block(body), torch.randn(2, 5, 6))["forward"]))
    found = set(run(body, import_model, apply, same_results, targets))
    assert not (found - before) & {"gelu", "silu", "hardswish", "layer_norm"}
    assert "linear" not in found or "add" in found


class Attention(nn.Module):
    """Heads of 8 features; ``form`` computes them from q, k, v ``[b, h, l, d]`` and a mask."""

    def __init__(self, form) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.form = form

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length = x.shape[:2]
        q, k, v = (
            p(x).reshape(batch, length, 2, 8).permute(0, 2, 1, 3) for p in (self.q, self.k, self.v)
        )
        return self.form(q, k, v, mask).permute(0, 2, 1, 3).reshape(batch, length, 16)


def softmax(scores: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores, -1)


def guarded(scores: torch.Tensor) -> torch.Tensor:
    weights = softmax(scores)
    return torch.where(torch.isnan(weights), 0.0, weights)


def merged(k: torch.Tensor) -> torch.Tensor:
    """The transposition as PyTorch's exporter writes it."""
    b, h, length, d = k.shape
    return k.reshape(b * h, length, d).permute(0, 2, 1).reshape(b, h, d, length)


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None, None]


@pytest.mark.parametrize(
    "form",
    [
        lambda q, k, v, m: softmax(q @ k.mT * 8**-0.5) @ v,
        lambda q, k, v, m: softmax(q @ k.mT / 8**0.5 + additive(m)) @ v,
        lambda q, k, v, m: softmax((q * 0.6) @ (k.mT * 0.6) + additive(m)) @ v,
        lambda q, k, v, m: guarded((q * 0.6) @ (merged(k) * 0.6) + additive(m)) @ v,
        lambda q, k, v, m: (
            softmax(torch.where(m[:, None, None], q @ k.mT * 0.3, torch.finfo(torch.float32).min))
            @ v
        ),
        lambda q, k, v, m: softmax(q @ k.mT + k.mean((0, 1, 3))) @ v,  # a bias for each key
    ],
)
def test_attention(form, import_model, apply, same_results, targets) -> None:
    model = Attention(form)
    mask = torch.ones(2, 5, dtype=torch.bool)
    programs = import_model(model, torch.randn(2, 5, 16), mask)
    result = apply(programs, *PASSES, FuseAttention())
    found = targets(result.programs["forward"])
    assert found["fused_attention"] == 1
    assert not {"matmul", "softmax"} & found.keys()
    (decision,) = [d for d in result.decisions if d.made_by == "fuse_attention"]
    assert "straight from the projections" in decision.reason
    for batch, length in ((1, 1), (3, 9)):
        mask = torch.rand(batch, length) > 0.4
        mask[:, 0] = True
        same_results(model, result.programs["forward"], [(torch.randn(batch, length, 16), mask)])


@pytest.mark.parametrize(
    "form",
    [
        lambda q, k, v, m: torch.softmax(q @ k.mT, 2) @ v,
        lambda q, k, v, m: softmax((q @ k.mT + additive(m)) * 0.3) @ v,
        lambda q, k, v, m: (softmax(q @ k.mT) * 2) @ v,
        lambda q, k, v, m: softmax(torch.where(m[:, None, None], q @ k.mT, -4.0)) @ v,
        lambda q, k, v, m: softmax(q @ k.mT * (q.shape[2] ** 0.5 * 0.1)) @ v,
        lambda q, k, v, m: softmax(q[:1] @ k[:1].mT + additive(m)) @ v[:1],  # batch from the mask
    ],
)
def test_attention_of_another_kind_stays(form, import_model, apply, targets) -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    programs = import_model(Attention(form), torch.randn(2, 5, 16), mask)
    found = targets(apply(programs, *PASSES).programs["forward"])
    assert found["matmul"] == 2
