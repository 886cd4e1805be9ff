"""Gated feed-forward networks: one linear for gate and up, then one operator."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsify.contracts import PassContext
from sparsify.passes.fuse_gate import FuseGate
from sparsify.passes.graph import arguments

INPUTS = [(torch.randn(b, s, 6),) for b, s in ((1, 1), (3, 7))]


class Network(nn.Module):
    def __init__(self, body=None, *, gate_bias=False, up_bias=False, up=5) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 5, bias=gate_bias)
        self.up = nn.Linear(6, up, bias=up_bias)
        self.down = nn.Linear(5, 6)
        self.body = body or (lambda m, x: F.silu(m.gate(x)) * m.up(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.body(self, x))


def gated_of(program):
    (node,) = (n for n in program.graph.nodes if "gated" in str(n.target))
    return arguments(node)


@pytest.mark.parametrize(
    ("body", "activation"),
    [
        (lambda m, x: F.silu(m.gate(x)) * m.up(x), "silu"),
        (lambda m, x: m.up(x) * F.gelu(m.gate(x), approximate="tanh"), "gelu_tanh"),
        (lambda m, x: F.gelu(m.gate(x)) * m.up(x), "gelu"),
        (lambda m, x: torch.relu(m.gate(x)) * m.up(x), "relu"),
    ],
)
def test_gate_and_up_become_one_linear(
    body, activation, import_model, apply, targets, same_results
):
    model = Network(body)
    result = apply(import_model(model, torch.randn(2, 5, 6)), FuseGate())
    program = result.programs["forward"]
    assert targets(program)["linear"] == 2 and targets(program)["mul"] == 0
    assert gated_of(program)["activation"] == activation
    weight = torch.cat([model.gate.weight, model.up.weight])
    assert torch.equal(program.weights["{gate,up}.weight"], weight)
    assert not {"gate.weight", "up.weight"} & set(program.weights)
    same_results(model, program, INPUTS)
    (decision,) = result.decisions
    assert decision.verdict == "rewritten" and decision.site == "{gate,up}"


@pytest.mark.parametrize(("gate_bias", "up_bias"), [(True, True), (True, False), (False, True)])
def test_biases(gate_bias, up_bias, import_model, apply, same_results):
    model = Network(gate_bias=gate_bias, up_bias=up_bias)
    result = apply(import_model(model, torch.randn(2, 5, 6)), FuseGate())
    assert result.programs.weights["{gate,up}.bias"].shape == (10,)
    same_results(model, result.programs["forward"], INPUTS)


def test_a_linear_that_computes_both_is_used_as_it_is(import_model, apply, targets, same_results):
    def body(m, x):
        gate, up = m.up(x).chunk(2, -1)
        return F.silu(gate) * up

    model = Network(body, up=10)
    result = apply(import_model(model, torch.randn(2, 5, 6)), FuseGate())
    program = result.programs["forward"]
    assert gated_of(program)["x"].target == torch.ops.aten.linear.default
    assert not {"mul", "silu", "split", "chunk", "slice"} & set(targets(program))
    same_results(model, program, INPUTS)


def test_halves_in_the_other_order_stay(import_model, apply, targets, same_results):
    def body(m, x):
        up, gate = m.up(x).chunk(2, -1)
        return F.silu(gate) * up

    model = Network(body, up=10)
    result = apply(import_model(model, torch.randn(2, 5, 6)), FuseGate())
    (decision,) = result.decisions
    assert decision.verdict == "skipped" and "no linear" in decision.reason
    same_results(model, result.programs["forward"], INPUTS)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: F.silu(m.gate(x)) * m.up(x.cos()), "different inputs"),
        (lambda m, x: F.silu(g := m.gate(x)) * m.up(x) + g, "2 nodes read the gate"),
        (lambda m, x: F.silu(m.gate(x)) * (u := m.up(x)) + u, "2 nodes read the up"),
        (lambda m, x: (a := F.silu(m.gate(x))) * m.up(x) + a, "2 nodes read the activated gate"),
    ],
)
def test_near_misses_say_why(body, reason, import_model, apply, targets, same_results):
    model = Network(body)
    result = apply(import_model(model, torch.randn(2, 5, 6)), FuseGate())
    (decision,) = result.decisions
    assert decision.verdict == "skipped" and reason in decision.reason
    assert targets(result.programs["forward"])["linear"] == 3
    same_results(model, result.programs["forward"], INPUTS)


def test_a_site_switched_off_is_not_merged(import_model, apply, targets):
    programs = import_model(Network(), torch.randn(2, 5, 6))
    context = PassContext(disabled_sites=frozenset({"gate"}))
    result = apply(programs, FuseGate(), context=context)
    (decision,) = result.decisions
    assert decision.reason == "one of the two is switched off"
    assert targets(result.programs["forward"])["gated"] == 0
