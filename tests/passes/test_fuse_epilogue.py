"""Activations and residual additions run inside the linear."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsify.passes.fuse_epilogue import FuseEpilogue
from sparsify.passes.graph import arguments
from sparsify.passes.sparse_linear import SparseLinear

PASSES = (SparseLinear(), FuseEpilogue())
INPUTS = [(torch.randn(b, s, 6),) for b, s in ((1, 1), (3, 17))]


class Block(nn.Module):
    """Two linears of 6 features; ``body`` combines them."""

    def __init__(self, body) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.body = body

    def forward(self, x: torch.Tensor):
        return self.body(self, x)


def linears(program):
    return [n for n in program.graph.nodes if "sparse_linear" in str(n.target)]


def run(body, import_model, apply, same_results):
    model = Block(body)
    result = apply(import_model(model, torch.randn(2, 5, 6)), *PASSES)
    same_results(model, result.programs["forward"], INPUTS)
    decisions = [d for d in result.decisions if d.made_by == "fuse_epilogue"]
    return result.programs["forward"], decisions


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.gelu, "gelu"),
        (lambda y: F.gelu(y, approximate="tanh"), "gelu_tanh"),
        (F.silu, "silu"),
        (F.relu, "relu"),
        (torch.tanh, "tanh"),
    ],
)
def test_activations(function, name, import_model, apply, targets, same_results):
    program, decisions = run(lambda m, x: function(m.a(x)), import_model, apply, same_results)
    assert set(targets(program)) == {"sparse_linear"}
    (linear,) = linears(program)
    assert arguments(linear)["activation"] == name
    (decision,) = decisions
    assert decision.verdict == "rewritten" and decision.site == "a" and name in decision.reason


@pytest.mark.parametrize("body", [lambda m, x: m.a(x) + x, lambda m, x: x + m.a(x)])
def test_a_residual_in_either_order(body, import_model, apply, targets, same_results):
    program, (decision,) = run(body, import_model, apply, same_results)
    assert set(targets(program)) == {"sparse_linear"}
    (linear,) = linears(program)
    assert arguments(linear)["residual"] is program.user_inputs()[0]
    assert decision.verdict == "rewritten"


def test_activation_then_residual(import_model, apply, targets, same_results):
    program, _ = run(lambda m, x: x + F.gelu(m.a(x)), import_model, apply, same_results)
    assert set(targets(program)) == {"sparse_linear"}


def test_dropout_between_is_no_obstacle(import_model, apply, targets, same_results):
    program, _ = run(
        lambda m, x: F.dropout(F.gelu(m.a(x)), 0.1, m.training) + x,
        import_model,
        apply,
        same_results,
    )
    assert set(targets(program)) == {"sparse_linear"}


def test_a_later_residual_operand_is_computed_first(import_model, apply, same_results):
    """The residual is computed after the linear in the graph; the fused linear moves behind it."""
    program, _ = run(
        lambda m, x: (lambda y: y + torch.sin(m.b(torch.cos(x))))(m.a(x)),
        import_model,
        apply,
        same_results,
    )
    assert sum(arguments(n)["residual"] is not None for n in linears(program)) == 1


def test_two_linears_added(import_model, apply, targets, same_results):
    program, _ = run(lambda m, x: m.a(x) + m.b(x), import_model, apply, same_results)
    assert targets(program) == {"sparse_linear": 2}


def test_a_chain_of_two_blocks(import_model, apply, targets, same_results):
    program, decisions = run(
        lambda m, x: x + m.b(F.relu(m.a(x))), import_model, apply, same_results
    )
    assert targets(program) == {"sparse_linear": 2}
    assert [d.site for d in decisions] == ["a", "b"]


def test_activation_after_the_residual_stays(import_model, apply, targets, same_results):
    program, decisions = run(lambda m, x: F.relu(m.a(x) + x), import_model, apply, same_results)
    assert targets(program) == {"sparse_linear": 1, "relu": 1}
    assert [d.verdict for d in decisions] == ["rewritten", "skipped"]
    assert "follows the residual" in decisions[1].reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: (lambda y: F.gelu(y) * y)(m.a(x)), "2 nodes read the linear"),
        (lambda m, x: m.a(x) + x.sum(0), "has shape"),
        (lambda m, x: m.a(x) + 1, "the number 1"),
        (lambda m, x: torch.add(m.a(x), x, alpha=2), "alpha=2"),
        (lambda m, x: (lambda y: y + y)(m.a(x)), "added to itself"),
    ],
)
def test_near_misses_say_why(body, reason, import_model, apply, same_results):
    program, decisions = run(body, import_model, apply, same_results)
    (linear,) = linears(program)
    assert arguments(linear)["activation"] == "none" and arguments(linear)["residual"] is None
    (decision,) = decisions
    assert decision.verdict == "skipped" and reason in decision.reason
