"""Mixtures that are lists of modules: recognised by what they compute, and left alone otherwise."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsify import ops
from sparsify.frontend.torch import import_torch
from sparsify.passes import PORTABLE, run_pipeline


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.w2, self.act = nn.Linear(12, 8, bias=False), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Clamped(Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.act(self.w1(x)).clamp(max=7) * self.w3(x).clamp(-7, 7))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))


class Mixture(nn.Module):
    """The loop that every such model has, with scores of one kind."""

    def __init__(
        self, expert: Any, kind: str, logits: bool = False, capacity: int | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(8, 5)
        self.experts = nn.ModuleList([expert() for _ in range(5)])
        self.kind, self.logits, self.capacity = kind, logits, capacity

    def forward(self, x: torch.Tensor) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        if self.kind == "sigmoid":
            weights, chosen = logits.sigmoid().topk(2, dim=-1)
        else:
            weights, chosen = logits.softmax(-1).topk(2, dim=-1)
        if self.kind == "normalised":
            weights = weights / weights.sum(-1, keepdim=True)
        if self.kind == "squared":
            weights = weights.square()
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            token, slot = token[: self.capacity], slot[: self.capacity]
            if len(token):
                y.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        y = y.reshape(x.shape)
        return (y, logits) if self.logits else y


class Model(nn.Module):
    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.enter, self.mixture = nn.Linear(6, 8), mixture

    def forward(self, x: torch.Tensor) -> Any:
        found = self.mixture(F.relu(self.enter(x)))
        return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("kind", ["normalised", "raw", "sigmoid"])
@pytest.mark.parametrize("expert", [Gated, plain])
def test_a_list_of_experts_becomes_an_operator(expert: Any, kind: str, logits: bool) -> None:
    model = Model(Mixture(expert, kind, logits)).eval()
    programs = import_torch(model, (torch.randn(2, 9, 6),))
    assert "forward" not in vars(model.mixture)
    program = run_pipeline(programs, PORTABLE, verify="numeric").programs["forward"]
    calls = [n for n in program.graph.nodes if n.target == ops.experts.overload]
    assert len(calls) == 1
    up, down = (program.weight_of(calls[0].args[i][0]) for i in (3, 4))
    assert up is not None and down is not None
    for shape in ((1, 1), (2, 9), (3, 20)):
        x = torch.randn(*shape, 6)
        torch.testing.assert_close(program.run(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "mixture",
    [
        pytest.param(lambda: Mixture(Gated, "squared"), id="other weights"),
        pytest.param(lambda: Mixture(Clamped, "normalised"), id="a clamp, seen in large numbers"),
        pytest.param(lambda: Mixture(Clamped, "sigmoid"), id="a clamp behind sigmoids"),
        pytest.param(lambda: Mixture(Gated, "normalised", capacity=16), id="a capacity"),
        pytest.param(lambda: Mixture(Gated, "raw", capacity=400), id="a capacity for most"),
    ],
)
def test_what_computes_something_else_stays_and_is_refused(mixture: Any) -> None:
    model = Model(mixture()).eval()
    with pytest.raises(ValueError, match=r"torch\.export cannot export Model"):
        import_torch(model, (torch.randn(2, 9, 6),))


def test_other_lists_of_modules_are_left_alone() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)
            self.layers = nn.ModuleList([plain() for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    program = import_torch(Chain(), (torch.randn(4, 8),))["forward"]
    assert not any(n.target == ops.experts.overload for n in program.graph.nodes)
