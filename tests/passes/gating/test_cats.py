"""CATS against the same written by hand: thresholds, results, errors, decisions."""

import pytest
import torch
from torch.nn import functional as F

import sparsify
from sparsify import ops
from sparsify.contracts import PassContext
from sparsify.passes.graph import arguments


@torch.no_grad()
def by_hand(block, batches, sparsity):
    """The gated forward, and the relative error of each network."""
    thresholds, errors = [], []
    x = torch.cat(batches)
    for gate, up, down in zip(block.gate, block.up, block.down, strict=True):
        opened, factor = F.silu(gate(x)), up(x)
        count = round(sparsity * opened.numel())
        limit = opened.abs().flatten().sort().values[count - 1]
        whole = opened * factor @ down.weight.T
        lost = torch.where(opened.abs() > limit, 0, opened) * factor @ down.weight.T
        thresholds.append(limit)
        errors.append(float(lost.norm() / whole.norm()))
        x = x + down(opened * factor)

    @torch.no_grad()
    def forward(x):
        for limit, gate, up, down in zip(thresholds, block.gate, block.up, block.down, strict=True):
            opened = F.silu(gate(x))
            x = x + down(torch.where(opened.abs() > limit, opened, 0) * up(x))
        return x

    return forward, errors


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_results_and_errors(sparsity, block, portable, calibration, apply):
    recipe = sparsify.Cats(sparsity, calibration)
    result = apply(portable(block), recipe)
    with torch.no_grad():
        forward, errors = by_hand(block, [b[0] for b in calibration.batches], sparsity)
        for x in (torch.randn(9, 24), *(b[0] for b in calibration.batches)):
            found = result.programs["forward"].run(x)
            torch.testing.assert_close(found, forward(x), atol=2e-5, rtol=2e-5)
    assert [d.verdict for d in result.decisions] == ["rewritten"] * 2
    for decision, error in zip(result.decisions, errors, strict=True):
        assert decision.error == pytest.approx(error, rel=1e-3)
        assert decision.density == pytest.approx(1 - sparsity, abs=0.002)


def test_halves_of_a_dense_weight_are_views(block, portable, calibration, apply):
    programs = portable(block)
    merged = programs.weights["{gate,up}.0.weight"]
    gated = apply(programs, sparsify.Cats(0.5, calibration)).programs.weights
    halves = [t for name, t in gated.items() if ".0.weight:dense" in name]
    storage = merged.untyped_storage().data_ptr()
    assert [t.untyped_storage().data_ptr() for t in halves] == [storage] * 2


def test_a_sparse_weight_stays_sparse(block, portable, calibration, apply):
    pruned = sparsify.prune(block, sparsify.Unstructured(0.6))
    result = apply(portable(pruned), sparsify.Cats(0.5, calibration))
    program = result.programs["forward"]
    linears = [n for n in program.graph.nodes if n.target in ops.LINEARS]
    assert len(linears) == 6
    assert {arguments(n)["layout"] for n in linears} == {"csr"}
    forward, _ = by_hand(pruned, [b[0] for b in calibration.batches], 0.5)
    x = torch.randn(9, 24)
    torch.testing.assert_close(program.run(x), forward(x), atol=2e-5, rtol=2e-5)


def test_a_place_with_too_large_an_error_stays_dense(block, portable, calibration, apply):
    errors = [d.error for d in apply(portable(block), sparsify.Cats(0.5, calibration)).decisions]
    limit = sum(errors) / 2
    recipe = sparsify.Cats(0.5, calibration, budget_error=limit)
    result = apply(portable(block), recipe)
    kept = [error <= limit for error in errors]
    assert [d.verdict == "rewritten" for d in result.decisions] == kept and sum(kept) == 1
    skipped = next(d for d in result.decisions if d.verdict == "skipped")
    assert "budget_error" in skipped.reason and skipped.error in errors
    gates = [n for n in result.programs["forward"].graph.nodes if n.target == ops.gate.overload]
    assert len(gates) == 1
    with pytest.raises(ValueError, match=r"strict=True.*budget_error"):
        recipe.run(portable(block), PassContext(strict=True))


def test_a_place_can_have_as_much_as_its_error_allows(block, portable, calibration, apply):
    plain = apply(portable(block), sparsify.Cats(0.9, calibration)).decisions
    limit = 0.1
    assert all(d.error > limit for d in plain)
    fitted = apply(portable(block), sparsify.Cats(0.9, calibration, budget_error=limit, fit=True))
    for decision, before in zip(fitted.decisions, plain, strict=True):
        assert decision.verdict == "rewritten"
        assert 0.7 * limit < decision.error <= limit and decision.density > before.density
    loose = sparsify.Cats(0.9, calibration, budget_error=0.999, fit=True)
    assert [d.error for d in apply(portable(block), loose).decisions] == [d.error for d in plain]


def test_sites_can_be_chosen(block, portable, calibration, apply):
    for options in ({"sites": ("*.1",)}, {"skip": ("*.0",)}):
        result = apply(portable(block), sparsify.Cats(0.5, calibration, **options))
        assert [d.site for d in result.decisions] == ["{gate,up}.1"]
    with pytest.raises(ValueError, match="nothing that it can gate"):
        apply(portable(block), sparsify.Cats(0.5, calibration, sites=("nowhere",)))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 50}, ValueError, "between 0 and 1"),
        ({"sparsity": "half"}, TypeError, "a number"),
        ({"calibration": [torch.randn(2, 24)]}, TypeError, "sparsify.Calibration"),
        ({"budget_error": 0}, ValueError, "above 0"),
        ({"fit": True}, ValueError, "needs a budget_error"),
        ({"entries": ("decode",)}, ValueError, "no program 'decode'"),
    ],
)
def test_wrong_options_are_named(options, error, words, block, portable, calibration):
    given = {"sparsity": 0.5, "calibration": calibration, **options}
    with pytest.raises(error, match=words):
        sparsify.Cats(**given).run(portable(block), PassContext())


def test_compiled_with_it(block, calibration):
    x = torch.randn(3, 24)
    recipe = sparsify.Cats(0.5, calibration)
    compiled = sparsify.compile(block, (x,), recipe=recipe, cache=False, num_threads=1)
    forward, _ = by_hand(block, [b[0] for b in calibration.batches], 0.5)
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, 24)
        torch.testing.assert_close(compiled(x), forward(x), atol=2e-5, rtol=2e-5)
    assert compiled.report.fallbacks == ()
