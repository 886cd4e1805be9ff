"""Normalisations over the last dimension become one operator."""

import pytest
import torch
from torch import nn

from sparsify.passes.fold_constants import FoldConstants
from sparsify.passes.fuse_norm import FuseNorm
from sparsify.passes.graph import arguments

INPUTS = [(torch.randn(b, s, 6) * 3 + 1,) for b, s in ((1, 1), (3, 17))]


class HandWritten(nn.Module):
    """Root-mean-square normalisation as model code spells it."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "square":
            return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-3) * self.weight
        wide = x.to(torch.float32)
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
        return self.weight * scaled.to(x.dtype)


def call_of(program):
    (node,) = (n for n in program.graph.nodes if "fused_norm" in str(n.target))
    return arguments(node)


@pytest.mark.parametrize(
    ("model", "kind", "epsilon"),
    [
        (nn.LayerNorm(6, eps=1e-3), "layer", 1e-3),
        (nn.LayerNorm(6, elementwise_affine=False), "layer", 1e-5),
        (nn.LayerNorm(6, bias=False), "layer", 1e-5),
        (nn.RMSNorm(6, eps=1e-3), "rms", 1e-3),
        (nn.RMSNorm(6), "rms", torch.finfo(torch.float32).eps),
        (HandWritten("llama"), "rms", 1e-3),
        (HandWritten("square"), "rms", 1e-3),
    ],
)
def test_norms(model, kind, epsilon, import_model, apply, targets, same_results):
    result = apply(import_model(model, torch.randn(2, 5, 6)), FuseNorm())
    program = result.programs["forward"]
    assert set(targets(program)) == {"fused_norm"}
    assert call_of(program)["kind"] == kind and call_of(program)["epsilon"] == epsilon
    same_results(model, program, INPUTS)
    (decision,) = result.decisions
    assert decision.verdict == "rewritten" and decision.operator == f"{kind}_norm"


def test_two_dimensions_are_skipped(import_model, apply, targets):
    model = nn.LayerNorm((5, 6))
    programs = import_model(model, torch.randn(2, 5, 6))
    result = apply(programs, FuseNorm())
    (decision,) = result.decisions
    assert decision.verdict == "skipped" and "over 2 dimensions" in decision.reason
    assert targets(result.programs["forward"])["fused_norm"] == 0


class Gemma(nn.Module):
    """A gain stored as its distance from one, and casts that keep the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6) - 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
        return (wide * (1.0 + self.weight.float())).type_as(x)


def test_a_gain_that_is_stored_without_its_one(import_model, apply, targets, same_results):
    model = Gemma()
    result = apply(import_model(model, torch.randn(2, 5, 6)), FoldConstants(), FuseNorm())
    program = result.programs["forward"]
    assert set(targets(program)) == {"fused_norm"}
    assert torch.equal(program.weights["weight_folded"], 1 + model.weight)
    same_results(model, program, INPUTS)


@pytest.mark.parametrize("swap", [lambda t: t.transpose(1, 2), lambda t: t.permute(0, 2, 1, 3)])
def test_a_transposition_of_heads_comes_after_the_norm(
    swap, import_model, apply, targets, same_results
):
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(2, eps=1e-3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(swap(x.unflatten(-1, (3, 2))))

    model = Heads()
    result = apply(import_model(model, torch.randn(2, 5, 6)), FuseNorm())
    program = result.programs["forward"]
    assert call_of(program)["x"].target == torch.ops.aten.view.default
    assert targets(program)["permute"] == 1
    same_results(model, program, INPUTS)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-3)),
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3)),
        lambda x, w: w * (x.cos() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)),
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x[..., :1] ** 2)),
    ],
)
def test_what_only_resembles_a_norm_is_left_alone(change, import_model, apply, same_results):
    class Near(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return change(x, self.weight)

    model = Near()
    result = apply(import_model(model, torch.randn(2, 5, 6)), FuseNorm())
    assert result.decisions == ()
    same_results(model, result.programs["forward"], INPUTS)
