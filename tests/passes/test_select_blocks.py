"""Recipes that select blocks for prefill: graphs, decisions, eager results, generation, trust."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import sparsify
from sparsify.calibration import Calibration
from sparsify.ops import PAGE, CacheShape
from sparsify.passes import run_pipeline
from sparsify.passes.attention_trust import BudgetError
from sparsify.passes.graph import arguments
from sparsify.passes.select_blocks import BlockSelection
from sparsify.program import ProgramSet
from tests.passes.test_select_pages import calls
from tests.tiny_lm import MODELS, portable_programs, prompts

TEXTS = Calibration([torch.arange(200) * 7 % 61])
SMALL: dict[str, Any] = {"keys": 16, "sinks": 16, "recent": 0}
RECIPES: dict[str, BlockSelection] = {
    "pooled_blocks": sparsify.PooledBlocks(**SMALL),
    "flex_prefill": sparsify.FlexPrefill(**SMALL, mass=0.5),
    "vertical_slash": sparsify.VerticalSlash(**SMALL),
}


@pytest.fixture(scope="module")
def llama() -> ProgramSet:
    return portable_programs("llama")


def logits(programs: ProgramSet, length: int) -> torch.Tensor:
    width = -(-length // PAGE)
    ids, pages = torch.arange(length)[None] % 61, torch.arange(width, dtype=torch.int32)[None]
    count = torch.tensor([length])
    cache = CacheShape(2, 2, 6).zeros(width)
    found: torch.Tensor = programs["prefill"].run(ids, pages, count * 0, count, *cache)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_prefill_selects_and_decode_does_not(llama: ProgramSet, name: str) -> None:
    result = run_pipeline(llama, [RECIPES[name]])
    assert not calls(result.programs["decode"], "select_blocks")
    prefill = result.programs["prefill"]
    selections, attentions = calls(prefill, "select_blocks"), calls(prefill, "paged_attention")
    assert [arguments(n)["selected"] for n in attentions] == selections and len(selections) == 2
    assert {arguments(n)["block"][1] for n in attentions} == {1}
    assert {d.verdict for d in result.decisions if d.site.startswith("prefill")} == {"rewritten"}
    # What is always read is all of a short prompt, and not of a long one.
    for length, same in ((40, True), (300, False)):
        before, after = logits(llama, length), logits(result.programs, length)
        assert torch.allclose(before, after, atol=1e-5, rtol=1e-5) == same


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("pooled_blocks", marks=pytest.mark.slow),
        "flex_prefill",
        pytest.param("vertical_slash", marks=pytest.mark.slow),
    ],
)
def test_compiled_prefill_is_the_eager_one(llama: ProgramSet, name: str) -> None:
    model = MODELS["llama"]()
    both = (RECIPES[name], sparsify.Quest(budget=48, skip=()))
    lm = sparsify.compile(model, recipe=both, num_threads=2, cache=False)
    assert all(
        region.kind == "compiled"
        for entry in ("prefill", "decode")
        for region in lm.compiled.entry(entry).plan.regions
    )
    programs = run_pipeline(llama, [RECIPES[name]]).programs
    ids = torch.arange(300)[None] % 61
    found = lm(ids, lm.new_cache(1, 300))
    torch.testing.assert_close(found, logits(programs, 300), atol=1e-4, rtol=1e-4)
    rows = lm.generate(prompts(61, [10, 150]), max_new_tokens=4)
    assert rows.shape == (2, 154)


@pytest.mark.parametrize("recipe", [*RECIPES.values(), sparsify.Quest(budget=48, skip=())])
def test_trust_on_calibration(llama: ProgramSet, recipe: Any) -> None:
    told = replace(recipe, calibration=TEXTS)
    decisions = run_pipeline(llama, [told]).decisions
    sites = [d for d in decisions if d.operator == "attention" and d.error is not None]
    assert len(sites) == 2 and sum(d.operator == "attention head" for d in decisions) == 8
    for site in sites:
        assert 0 < site.density < 0.6 and 0 < site.error < 2 and 0 < site.mass < 1
    with pytest.raises(BudgetError, match="head"):
        run_pipeline(llama, [replace(told, budget_error=1e-3)])


@pytest.mark.parametrize("recipe", [RECIPES["flex_prefill"], sparsify.Quest(48, skip=())])
def test_a_budget_needs_texts_of_which_something_is_left_out(
    llama: ProgramSet, recipe: Any
) -> None:
    short = Calibration([torch.arange(9), torch.arange(16)])
    decisions = run_pipeline(llama, [replace(recipe, calibration=short)]).decisions
    assert {d.density for d in decisions if d.error is not None} == {1.0}
    with pytest.raises(ValueError, match=r"have 16, 9 tokens, of which everything is read"):
        run_pipeline(llama, [replace(recipe, calibration=short, budget_error=0.1)])


def test_sites_and_what_is_skipped(llama: ProgramSet) -> None:
    for options, reason in (({"sites": "*.1.*"}, "is for"), ({"skip": ("*layers.0.*",)}, "skips")):
        result = run_pipeline(llama, [replace(RECIPES["pooled_blocks"], **options)])
        (call,) = calls(result.programs["prefill"], "select_blocks")
        assert arguments(call)["layer"] == 1
        told = [d.reason for d in result.decisions if d.site == "prefill.layers.0.attention"]
        assert len(told) == 1 and reason in told[0]


def test_what_is_skipped_below_the_maximum_is_reported(llama: ProgramSet) -> None:
    """Of a tiny model scores hardly differ: a block is low at a small distance only."""
    whole = sparsify.PooledBlocks(1.0, **SMALL, calibration=TEXTS)
    for skip, some in ((1e-3, True), (50.0, False)):
        result = run_pipeline(llama, [replace(whole, skip_below=skip)])
        (_, attention) = calls(result.programs["prefill"], "paged_attention")
        assert arguments(attention)["skip"] == skip
        told = [d for d in result.decisions if d.operator == "attention" and d.error is not None]
        assert any("skipped for low scores" in d.reason for d in told) == some
        assert any(d.error > 0 for d in told) == some and {d.density for d in told} == {1.0}
    with pytest.raises(BudgetError, match="head"):
        run_pipeline(llama, [replace(whole, skip_below=1e-3, budget_error=1e-6)])


def test_a_selection_of_everything_costs_nothing(llama: ProgramSet) -> None:
    recipe = sparsify.PooledBlocks(1.0, calibration=TEXTS, budget_error=1e-6)
    decisions = run_pipeline(llama, [recipe]).decisions
    assert {d.density for d in decisions if d.error is not None} == {1.0}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"density": 0.0}, "above 0"),
        ({"keys": 40}, "multiple of 16"),
        ({"recent": -1}, "at least 0"),
        ({"skip_below": -1}, "at least 0"),
        ({"budget_error": 0.1}, "needs calibration"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify.PooledBlocks(**options)
