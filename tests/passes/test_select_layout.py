"""Each weight is bound to the layout with the smallest predicted time."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsify.layouts import PackedDense, Sell, parse
from sparsify.passes.graph import arguments
from sparsify.passes.select_layout import SelectLayout
from sparsify.passes.sparse_linear import SparseLinear
from sparsify.program import PassContext, Program, ProgramSet


def model_of(density: float, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(40, 24, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(24, 40) < density)
    return nn.Sequential(linear)


def linear_of(program: Program):
    return [n for n in program.graph.nodes if "sparse_linear" in str(n.target)]


def selected(result):
    return [d for d in result.decisions if d.made_by == "select_layout"]


def test_a_sparse_weight_is_packed_and_its_csr_dropped(import_model, apply, cost, same_results):
    model = model_of(0.2)
    context = PassContext(cost=cost)
    programs = import_model(model, torch.randn(2, 8, 40))
    result = apply(programs, SparseLinear(), SelectLayout(), context=context)
    program = result.programs["forward"]
    (node,) = linear_of(program)
    spec = "sell{rows=4,k_block=32,window=16}"
    assert arguments(node)["layout"] == spec
    assert not [name for name in program.weights if ":csr" in name]
    packed = {t: program.weights[f"0.weight:sell.{t}"] for t in Sell.tensors}
    parse(spec).validate(packed, (24, 40))
    assert torch.equal(parse(spec).unpack(packed, (24, 40)), model[0].weight)
    same_results(model, program, [(torch.randn(1, 1, 40),), (torch.randn(3, 17, 40),)])


def test_the_decision_states_what_was_compared(import_model, apply, cost):
    model = model_of(0.2)
    programs = import_model(model, torch.randn(2, 8, 40))
    result = apply(programs, SparseLinear(), SelectLayout(), context=PassContext(cost=cost))
    (decision,) = selected(result)
    nnz = int((model[0].weight != 0).sum())
    assert decision.verdict == "sparse" and decision.site == "0"
    assert decision.density == nnz / 960
    assert decision.predicted_seconds == pytest.approx(1.5 * nnz * 16 * 1e-11)
    assert decision.dense_seconds == pytest.approx(960 * 16 * 1e-11)
    assert decision.bytes_dense == 3840
    weights = result.programs.weights
    assert decision.bytes_stored == sum(weights[f"0.weight:sell.{t}"].nbytes for t in Sell.tensors)
    ratio = f"{decision.dense_seconds / decision.predicted_seconds:.1f}x faster than dense"
    assert ratio in decision.reason and "at 16 tokens" in decision.reason


@pytest.mark.parametrize(
    ("density", "reason"),
    [(1.1, "100% nonzero: dense is the fastest"), (0.8, "dense predicted 1.2x faster than sell")],
)
def test_dense_wins_where_it_is_faster(density, reason, import_model, apply, cost):
    programs = import_model(model_of(density), torch.randn(2, 8, 40))
    result = apply(programs, SparseLinear(), SelectLayout(), context=PassContext(cost=cost))
    (decision,) = selected(result)
    assert (decision.verdict, decision.layout) == ("dense", "packed_dense{rows=6}")
    assert reason in decision.reason
    (node,) = linear_of(result.programs["forward"])
    assert arguments(node)["layout"] == "packed_dense{rows=6}"


def test_a_site_switched_off_is_dense(import_model, apply, cost):
    programs = import_model(model_of(0.1), torch.randn(2, 8, 40))
    context = PassContext(cost=cost, disabled_sites=frozenset({"0"}))
    result = apply(programs, SparseLinear(), SelectLayout(), context=context)
    (decision,) = selected(result)
    assert decision.verdict == "dense" and "switched off" in decision.reason


def test_the_layout_can_be_forced(import_model, apply, cost):
    programs = import_model(model_of(1.1), torch.randn(2, 8, 40))
    forced = SelectLayout(layout="sell{rows=8,k_block=16,window=8}")
    result = apply(programs, SparseLinear(), forced, context=PassContext(cost=cost))
    (decision,) = selected(result)
    assert decision.verdict == "sparse" and decision.layout == forced.layout


def test_a_layout_that_does_not_fit_is_not_a_candidate(import_model, apply, cost, monkeypatch):
    monkeypatch.setattr(Sell, "fits", lambda self, stats: "rows are too uneven")
    programs = import_model(model_of(0.1), torch.randn(2, 8, 40))
    result = apply(programs, SparseLinear(), SelectLayout(), context=PassContext(cost=cost))
    (decision,) = selected(result)
    assert decision.verdict == "dense" and "rows are too uneven" in decision.reason


def test_the_token_count_is_an_option(import_model, apply, cost):
    programs = import_model(model_of(0.1), torch.randn(2, 8, 40))
    result = apply(programs, SparseLinear(), SelectLayout(tokens=1), context=PassContext(cost=cost))
    assert "at 1 token" in selected(result)[0].reason


def test_entry_programs_share_one_packing(import_model, apply, cost):
    """The choice counts the time of both entries, and both hold the same tensors."""
    (entry,) = import_model(model_of(0.2), torch.randn(2, 8, 40))
    pair = ProgramSet((replace(entry, name="prefill"), replace(entry, name="decode")))
    result = apply(pair, SparseLinear(), SelectLayout(), context=PassContext(cost=cost))
    (decision,) = selected(result)
    assert decision.dense_seconds == pytest.approx(2 * 960 * 16 * 1e-11)
    name = "0.weight:sell.values"
    first, second = (p.weights[name] for p in result.programs)
    assert first.data_ptr() == second.data_ptr()


def test_a_cost_model_is_needed(import_model):
    programs = import_model(model_of(0.2), torch.randn(2, 8, 40))
    with pytest.raises(ValueError, match="no cost model"):
        SelectLayout().run(programs, PassContext())


def test_the_dense_reference_exists_without_a_dense_candidate(
    import_model, apply, cost, monkeypatch
):
    monkeypatch.setattr(type(cost), "candidates", lambda self, shape, nnz: (Sell(),))
    programs = import_model(model_of(0.2), torch.randn(2, 8, 40))
    result = apply(programs, SparseLinear(), SelectLayout(), context=PassContext(cost=cost))
    assert selected(result)[0].dense_seconds == cost.linear_seconds(PackedDense(), (24, 40), 0, 16)
