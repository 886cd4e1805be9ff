"""Linears that may skip zeros: which layout they get, where they skip, and what is said of it."""

import pytest
import torch
from torch import nn

from sparsify.contracts import Activity, PassContext
from sparsify.layouts import Dense, DenseColumns, Layout
from sparsify.passes.graph import arguments
from sparsify.passes.select_layout import SelectLayout
from sparsify.program import Program
from tests.passes.conftest import FakeCost

COLUMNS = DenseColumns(32)


class SkippingCost(FakeCost):
    """Kernels that skip take time by what is active; others read those layouts slowly."""

    def linear_seconds(
        self, layout: Layout, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        seconds = super().linear_seconds(layout, shape, nnz, tokens)
        return 1.05 * seconds if isinstance(layout, DenseColumns | Dense) else seconds

    def active_seconds(
        self, layout: Layout, shape: tuple[int, int], tokens: int, activity: Activity
    ) -> float | None:
        kind = DenseColumns if activity.side == "inputs" else Dense
        if not isinstance(layout, kind) or tokens > 16:
            return None
        return 1.1 * activity.share * shape[0] * shape[1] * tokens * 1e-11

    def active_candidates(
        self, shape: tuple[int, int], tokens: int, activity: Activity
    ) -> tuple[Layout, ...]:
        return (COLUMNS,) if activity.side == "inputs" else (Dense(),)


class Active(nn.Module):
    def __init__(self, share: float, density: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.share = share
        self.down = nn.Parameter(torch.randn(24, 40) * (torch.rand(24, 40) < density))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros = torch.relu(x)
        return torch.ops.sparsify.active_linear(
            zeros, [self.down], "dense", 24, 40, self.share, None, "silu"
        )


class Gated(Active):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.relu(x[..., :24])
        return torch.ops.sparsify.gated_linear(x, gate, [self.down], "dense", 24, 40, self.share)


def linears(program: Program) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if "_linear" in str(n.target)]


@pytest.fixture
def select(import_model, apply):
    """``select(model, tokens)``: the program, its linear, and the decision."""

    def run(model: nn.Module, tokens: int, **context):
        programs = import_model(model, torch.randn(tokens, 40), rows=tokens)
        result = apply(
            programs, SelectLayout(), context=PassContext(cost=SkippingCost(), **context)
        )
        program = result.programs["forward"]
        (node,) = linears(program)
        (decision,) = (d for d in result.decisions if d.made_by == "select_layout")
        return program, node, decision

    return run


def test_inputs_that_are_zero_are_skipped(select, same_results):
    model = Active(0.2)
    program, node, decision = select(model, 2)
    assert "active_linear" in str(node.target)
    assert arguments(node)["layout"] == decision.layout == COLUMNS.spec
    assert decision.verdict == "sparse"
    assert "20% of inputs active at 2 tokens, 36% in the union" in decision.reason
    assert "dense_columns predicted 2.5x faster than dense" in decision.reason
    assert decision.bytes_stored == program.weights[f"down:{COLUMNS.spec}.panels"].nbytes
    same_results(model, program, [(torch.randn(1, 40),), (torch.randn(2, 40),)])


def test_outputs_under_a_closed_gate_are_skipped(select, same_results):
    model = Gated(0.2)
    program, node, decision = select(model, 2)
    assert "gated_linear" in str(node.target)
    assert arguments(node)["layout"] == decision.layout == "dense"
    assert "20% of outputs active" in decision.reason
    assert list(program.weights) == ["down"]
    same_results(model, program, [(torch.randn(2, 40),)])


@pytest.mark.parametrize("kind", [Active, Gated])
def test_a_union_that_is_not_sparse_is_computed_whole(kind, select, targets, same_results):
    model = kind(0.4)
    program, node, decision = select(model, 8)
    assert "sparse_linear" in str(node.target)
    assert arguments(node)["layout"] == decision.layout == "packed_dense{rows=6}"
    assert decision.verdict == "dense"
    assert "union of 8 tokens is not sparse (98% active)" in decision.reason
    assert targets(program)["mul"] == (kind is Gated)
    same_results(model, program, [(torch.randn(8, 40),), (torch.randn(3, 40),)])


@pytest.mark.parametrize("kind", [Active, Gated])
def test_a_sparse_weight_whose_kernel_is_faster_is_computed_as_it_is(kind, select, same_results):
    model = kind(0.5, density=0.2)
    program, node, decision = select(model, 2)
    assert "sparse_linear" in str(node.target) and decision.layout.startswith("sell")
    assert "sell predicted" in decision.reason and "as it is" in decision.reason
    same_results(model, program, [(torch.randn(1, 40),), (torch.randn(2, 40),)])


def test_a_site_switched_off_skips_nothing(select):
    _, node, decision = select(Active(0.1), 2, disabled_sites=frozenset({"down"}))
    assert "sparse_linear" in str(node.target) and decision.verdict == "dense"
    assert "switched off" in decision.reason


def test_a_target_without_such_kernels_computes_all(import_model, apply, cost):
    programs = import_model(Active(0.1), torch.randn(2, 40), rows=2)
    result = apply(programs, SelectLayout(), context=PassContext(cost=cost))
    (node,) = linears(result.programs["forward"])
    assert "sparse_linear" in str(node.target)
