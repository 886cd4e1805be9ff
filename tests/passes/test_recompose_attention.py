"""Attention that is spelled out, with any number of batch dimensions, becomes one operator."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsify.frontend.torch import import_torch
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.graph import arguments

D, H = 32, 4


class Spelled(nn.Module):
    def __init__(self, kv_heads: int = H) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(D, D), nn.Linear(D, D)
        self.k, self.v = (nn.Linear(D, D // H * kv_heads) for _ in range(2))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, D // H)).transpose(1, 2)

    def parts(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        return [self.heads(p(z)) for p, z in ((self.q, x), (self.k, y), (self.v, y))]


class Merged(Spelled):
    """``bmm`` over batch and heads as one, the mask added between, as models once were written."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        b, s, t = x.shape[0], x.shape[1], y.shape[1]
        q, k, v = (z.reshape(b * H, z.shape[2], D // H) for z in self.parts(x, y))
        scores = torch.bmm(q * (D // H) ** -0.5, k.transpose(1, 2)).view(b, H, s, t)
        scores = scores + torch.where(torch.arange(t) < 6, 0.0, -1e4)
        weights = scores.view(b * H, s, t).softmax(-1)
        found = torch.bmm(weights, v).view(b, H, s, D // H)
        return self.o(found.transpose(1, 2).reshape(b, s, D))


class Single(Spelled):
    """One head of all features, without a dimension for it."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(y), self.v(y)
        return self.o((q @ k.mT / math.sqrt(D)).softmax(-1) @ v)


class SingleCall(Spelled):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(y), self.v(y)))


class Einsum(Spelled):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = (z.transpose(1, 2) for z in self.parts(x, y))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3).softmax(-1)
        return self.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class Grouped(Spelled):
    """Key heads broadcast over the query heads of their group."""

    def __init__(self) -> None:
        super().__init__(kv_heads=2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = self.parts(x, y)
        q, k, v = q.unflatten(1, (2, 2)), k[:, :, None], v[:, :, None]
        found = (q @ k.transpose(3, 4) * 0.4).softmax(-1) @ v
        return self.o(found.flatten(1, 2).transpose(1, 2).flatten(2))


class Capped(Spelled):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = self.parts(x, y)
        scores = torch.tanh(q @ k.mT * 0.7 / 3.0) * 3.0
        hidden = torch.arange(y.shape[1]) > torch.arange(x.shape[1])[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Together(nn.Module):
    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        return [model(x, y) for model in self.models]


def run(*models: nn.Module) -> tuple[list[Any], Any]:
    """(operands of each attention, decisions), after comparing results on odd sizes."""
    torch.manual_seed(0)
    model = Together(list(models)).eval()
    programs = import_torch(model, (torch.randn(2, 5, D), torch.randn(2, 7, D)))
    result = run_pipeline(programs, PORTABLE)
    program = result.programs["forward"]
    for batch, queries, keys in [(1, 1, 1), (3, 8, 13), (2, 9, 3)]:
        x, y = torch.randn(batch, queries, D), torch.randn(batch, keys, D)
        torch.testing.assert_close(program.run(x, y), model(x, y), rtol=1e-5, atol=1e-5)
    found = [n for n in program.graph.nodes if "fused_attention" in str(n.target)]
    return [arguments(n) for n in found], result.decisions


def test_spelled_attention_is_one_operator() -> None:
    models = Merged(), Single(), SingleCall(), Einsum(), Grouped(), Capped()
    found, _ = run(*models)
    assert [(o["heads"], o["kv_heads"]) for o in found] == [
        (H, H), (1, 1), (1, 1), (H, H), (H, 2), (H, H),
    ]  # fmt: skip
    assert all(o["head_dim"] == D // o["heads"] for o in found)
    *plain, capped = found
    assert all(o["softcap"] == 0.0 for o in plain)
    assert capped["softcap"] == 3.0 and capped["scale"] == pytest.approx(0.7)
    assert capped["causal"] and capped["mask"] is None


class SinkLogit(Spelled):
    """A logit beside the scores takes a share of the softmax, as in gpt-oss."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = self.parts(x, y)
        scores = q @ k.mT
        beside = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1)
        return self.o((beside.softmax(-1)[..., :-1] @ v).transpose(1, 2).flatten(2))


class Powered(Spelled):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = self.parts(x, y)
        return self.o(((q @ k.mT).square().softmax(-1) @ v).transpose(1, 2).flatten(2))


class Gate(nn.Module):
    """A softmax over features, as of a router, is no attention and not worth a word."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.softmax(-1) * 2 + y.mean(1, keepdim=True)


def test_what_is_not_understood_says_why() -> None:
    found, decisions = run(SinkLogit(), Powered(), Gate())
    assert found == []
    sink, powered = [d.reason for d in decisions if d.operator == "attention"]
    assert "aten.cat" in sink
    assert "aten.pow" in powered and "stands between" in powered
