"""Each weight is bound to the layout with the smallest predicted time."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsify.contracts import MeasuringCostModel, PassContext
from sparsify.layouts import Bitmap, Dense, Layout, PackedDense, Sell, form_of, parse
from sparsify.passes.graph import arguments
from sparsify.passes.select_layout import SelectLayout
from sparsify.passes.sparse_linear import SparseLinear
from sparsify.program import Program, ProgramSet


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
    packed = {t: program.weights[f"0.weight:{spec}.{t}"] for t in Sell.tensors}
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
    names = [f"0.weight:{decision.layout}.{t}" for t in Sell.tensors]
    assert decision.bytes_stored == sum(weights[name].nbytes for name in names)
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
    name = f"0.weight:{decision.layout}.values"
    first, second = (p.weights[name] for p in result.programs)
    assert first.data_ptr() == second.data_ptr()


def test_a_cost_model_is_needed(import_model):
    programs = import_model(model_of(0.2), torch.randn(2, 8, 40))
    with pytest.raises(ValueError, match="no cost model"):
        SelectLayout().run(programs, PassContext())


def test_the_dense_reference_exists_without_a_dense_candidate(
    import_model, apply, cost, monkeypatch
):
    monkeypatch.setattr(type(cost), "candidates", lambda self, shape, nnz, tokens: (Sell(),))
    programs = import_model(model_of(0.2), torch.randn(2, 8, 40))
    result = apply(programs, SparseLinear(), SelectLayout(), context=PassContext(cost=cost))
    assert selected(result)[0].dense_seconds == cost.linear_seconds(PackedDense(), (24, 40), 0, 16)


class FormCost:
    """SELL is fast at many tokens, a bitmap at few; dense is slow at both."""

    dense: tuple[Layout, ...] = (PackedDense(rows=6),)

    def linear_seconds(self, layout, shape, nnz, tokens):
        fast = {"lanes": "sell", "rows": "bitmap"}[form_of(tokens)]
        by_name = {fast: 1.0, "packed_dense": 9.0, "dense": 9.5}
        return by_name.get(layout.name, 4.0) * tokens * 1e-6

    def candidates(self, shape, nnz, tokens):
        return Sell(rows=4, k_block=32, window=16), BITMAP, *self.dense


BITMAP = Bitmap()


def prefill_and_decode(import_model, model, many=16, few=4) -> ProgramSet:
    (prefill,) = import_model(model, torch.randn(2, many // 2, 40))
    (decode,) = import_model(model, torch.randn(few, 1, 40), rows=8)
    return ProgramSet((replace(prefill, name="prefill"), replace(decode, name="decode")))


def layouts_of(result) -> list[str]:
    return [arguments(linear_of(p)[0])["layout"] for p in result.programs]


def test_a_weight_for_few_and_many_tokens_is_kept_in_two_layouts(import_model, apply, same_results):
    model = model_of(0.2)
    pair = prefill_and_decode(import_model, model)
    result = apply(pair, SparseLinear(), SelectLayout(), context=PassContext(cost=FormCost()))
    assert layouts_of(result) == ["sell{rows=4,k_block=32,window=16}", BITMAP.spec]
    prefill, decode = result.programs
    same_results(model, prefill, [(torch.randn(1, 3, 40),), (torch.randn(1, 33, 40),)])
    same_results(model, decode, [(torch.randn(1, 1, 40),), (torch.randn(8, 1, 40),)])
    (decision,) = selected(result)
    assert decision.verdict == "sparse"
    assert decision.layout == f"sell{{rows=4,k_block=32,window=16}} + {BITMAP.spec}"
    stored = {name: t for name, t in result.programs.weights.items() if name.startswith("0.weight")}
    assert {name.split(":")[1].split("{")[0] for name in stored} == {"sell", "bitmap"}
    assert decision.bytes_stored == sum(t.nbytes for t in stored.values()) <= decision.bytes_dense
    assert decision.predicted_seconds == pytest.approx(20e-6)
    assert decision.dense_seconds == pytest.approx(9 * 20e-6)
    assert "sell at 16 tokens (" in decision.reason and "KB, 16 us)" in decision.reason
    assert "bitmap at 4 tokens (" in decision.reason and "KB, 4.0 us)" in decision.reason
    assert "predicted 1.6x faster than sell for both" in decision.reason


@pytest.mark.parametrize(("density", "both"), [(0.2, 0.0), (0.2, 0.3), (0.9, 1.0)])
def test_without_memory_for_two_layouts_the_best_one_serves_both(
    density, both, import_model, apply
):
    pair = prefill_and_decode(import_model, model_of(density))
    passes = SparseLinear(max_density=1.0), SelectLayout(both=both)
    result = apply(pair, *passes, context=PassContext(cost=FormCost()))
    assert layouts_of(result) == ["sell{rows=4,k_block=32,window=16}"] * 2


def test_two_layouts_that_are_not_faster_are_one(import_model, apply, monkeypatch):
    monkeypatch.setattr(FormCost, "linear_seconds", lambda self, layout, shape, nnz, tokens: 1e-6)
    pair = prefill_and_decode(import_model, model_of(0.2))
    result = apply(pair, SparseLinear(), SelectLayout(), context=PassContext(cost=FormCost()))
    assert len(set(layouts_of(result))) == 1


class StepCost(FormCost):
    """Only dense is fast at few tokens; SELL takes three times as long there."""

    def linear_seconds(self, layout, shape, nnz, tokens):
        if form_of(tokens) == "lanes":
            return super().linear_seconds(layout, shape, nnz, tokens)
        return {"packed_dense": 1.0, "dense": 1.0}.get(layout.name, 3.0) * tokens * 1e-6


def test_what_prompts_gain_makes_no_step_slower(import_model, apply):
    programs = prefill_and_decode(import_model, model_of(0.2))
    for both, expected in ((1.0, "packed_dense"), (2.0, "packed_dense + sell")):
        passes = SparseLinear(), SelectLayout(both=both)
        result = apply(programs, *passes, context=PassContext(cost=StepCost()))
        (decision,) = selected(result)
        names = [parse(spec).name for spec in decision.layout.split(" + ")]
        assert " + ".join(sorted(names)) == expected
        if both == 1.0:
            assert "sell is predicted to take 3.00 of its time at 4 tokens" in decision.reason


def test_two_packings_of_one_layout_are_two_layouts(import_model, apply, monkeypatch):
    wide, narrow = Sell(rows=8, k_block=16, window=8), Sell(rows=4, k_block=16, window=8)

    def seconds(self, layout, shape, nnz, tokens):
        return 1.0 if (layout == wide) == (form_of(tokens) == "rows") else 2.0

    monkeypatch.setattr(FormCost, "linear_seconds", seconds)
    monkeypatch.setattr(FormCost, "candidates", lambda *_: (wide, narrow))
    pair = prefill_and_decode(import_model, model_of(0.2))
    passes = SparseLinear(), SelectLayout(both=2.0)
    result = apply(pair, *passes, context=PassContext(cost=FormCost()))
    assert layouts_of(result) == [narrow.spec, wide.spec]
    for program, layout in zip(result.programs, (narrow, wide), strict=True):
        packed = {t: program.weights[f"0.weight:{layout.spec}.{t}"] for t in Sell.tensors}
        layout.validate(packed, (24, 40))


class Tied(nn.Module):
    """A language model's ends: an embedding whose table is the head's weight."""

    def __init__(self, density: float = 1.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(24, 40)
        self.head = nn.Linear(40, 24, bias=False)
        with torch.no_grad():
            self.embed.weight.mul_(torch.rand(24, 40) < density)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.parametrize(("most", "layout"), [(8, "dense"), (16, "packed_dense{rows=6}")])
def test_a_tied_embedding_stays_a_plain_matrix_for_few_tokens(
    most, layout, import_model, apply, monkeypatch
):
    monkeypatch.setattr(FormCost, "dense", (PackedDense(rows=6), Dense()))
    programs = import_model(Tied(), torch.zeros(4, 1, dtype=torch.int64), rows=most)
    result = apply(programs, SparseLinear(), SelectLayout(), context=PassContext(cost=DenseCost()))
    assert layouts_of(result) == [layout]
    (decision,) = selected(result)
    assert ("in memory anyway" in decision.reason) == (most == 8)
    if most == 8:
        assert result.programs.weights.nbytes == 24 * 40 * 4


class DenseCost(FormCost):
    def linear_seconds(self, layout, shape, nnz, tokens):
        return 1.0 if layout.name == "packed_dense" else 2.0


def test_a_sparse_head_is_not_held_to_its_embedding(import_model, apply, monkeypatch):
    monkeypatch.setattr(FormCost, "dense", (PackedDense(rows=6), Dense()))
    programs = import_model(Tied(0.1), torch.zeros(4, 1, dtype=torch.int64), rows=8)
    result = apply(programs, SparseLinear(), SelectLayout(), context=PassContext(cost=FormCost()))
    assert layouts_of(result) == [BITMAP.spec]


class Stopwatch(FormCost):
    """Measures by asking the other way round: dense wins."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], list[int]]] = []
        self.predicted = FormCost()

    def measure(self, weights):
        self.asked += [(tuple(weight.shape), sorted(tokens)) for weight, tokens in weights]

    def measured_seconds(self, layout, shape, nnz, tokens):
        return self.linear_seconds(layout, shape, nnz, tokens)

    def linear_seconds(self, layout, shape, nnz, tokens):
        return 1e-6 if layout.name == "packed_dense" else 2e-6


def test_what_was_measured_decides_and_is_called_so(import_model, apply):
    cost = Stopwatch()
    assert isinstance(cost, MeasuringCostModel)
    pair = prefill_and_decode(import_model, model_of(0.2))
    result = apply(pair, SparseLinear(), SelectLayout(), context=PassContext(cost=cost))
    (decision,) = selected(result)
    assert cost.asked == [((24, 40), [4, 16])]
    assert decision.layout == "packed_dense{rows=6}"
    assert decision.measured_seconds == pytest.approx(2e-6)
    assert "dense measured 2.0x faster than" in decision.reason


@pytest.mark.parametrize("forced", [True, False])
def test_nothing_is_measured_where_nothing_is_chosen(forced, import_model, apply):
    cost = Stopwatch()
    context = PassContext(cost=cost, disabled_sites=frozenset() if forced else frozenset({"0"}))
    select = SelectLayout(layout="packed_dense{rows=6}" if forced else "")
    apply(prefill_and_decode(import_model, model_of(0.2)), SparseLinear(), select, context=context)
    assert cost.asked == []


def test_a_prediction_states_no_measured_time(import_model, apply, cost):
    programs = import_model(model_of(0.2), torch.randn(2, 8, 40))
    result = apply(programs, SparseLinear(), SelectLayout(), context=PassContext(cost=cost))
    assert selected(result)[0].measured_seconds is None
