"""Patterns of heads that are searched on texts: what is found, applied, reported and refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import sparsify
from sparsify import ops
from sparsify.calibration import Calibration
from sparsify.ops import PAGE, CacheShape
from sparsify.passes import run_pipeline
from sparsify.passes.attention_trust import BudgetError
from sparsify.passes.graph import arguments
from sparsify.program import ProgramSet
from tests.passes.test_select_blocks import logits
from tests.passes.test_select_pages import calls
from tests.tiny_lm import MODELS, portable_programs, prompts

TEXTS = Calibration([torch.arange(200) * 7 % 61])
SMALL: dict[str, Any] = {"keys": 16, "sinks": 16, "recent": 0}
RECIPE = sparsify.MInference(**SMALL, calibration=TEXTS)

TOKENS, BLOCKS = 512, 32
LINE = 3
"""Block of the key that all queries of a head look at."""
FAR = (0, 0, 3, 2, 9, 1, 6, 12)
"""Block of keys that each block of 64 queries of a head looks at, along no line."""


class Constructed(torch.nn.Module):
    """Attention of two key heads with two query heads each, whose tokens are their positions.

    A key's features are its block, an angle that grows with its position, and a spike: one key of
    one block has a large one, all keys of the others a small one. So the mean of the block with the
    spike is the lowest. A query head looks at one of the three alone, or, as in a
    text that ends with a question, at blocks and in the last 4 tokens at the spike.
    """

    def __init__(self, looks: tuple[str, ...], window: int = 0) -> None:
        super().__init__()
        self.window = window
        place = torch.arange(TOKENS)
        block, angle = place // 16, place * (torch.pi / TOKENS)
        one_hot = torch.eye(BLOCKS)
        spike = torch.where(block == LINE, 0.0, 2.0)
        spike[LINE * 16 + 5] = 30.0
        turning = torch.stack((angle.cos(), angle.sin()), 1)
        key = torch.cat((one_hot[block], turning, spike[:, None]), 1)
        self.dim = key.shape[1]
        names = ("block", "near", "line", "asks")
        queries = {name: torch.zeros(TOKENS, self.dim) for name in names}
        queries["block"][:, :BLOCKS] = 20 * one_hot[torch.tensor(FAR)[place // 64]]
        queries["near"][:, BLOCKS:-1] = 20000 * turning
        queries["line"][:, -1] = 1.0
        queries["asks"][:-4], queries["asks"][-4:] = queries["block"][:-4], queries["line"][-4:]
        value = torch.randn(TOKENS, 2 * self.dim, generator=torch.Generator().manual_seed(0))
        tables = (torch.cat([queries[name] for name in looks], 1), key.repeat(1, 2), value)
        self.tables = torch.nn.ParameterList(torch.nn.Parameter(table, False) for table in tables)

    def forward(
        self,
        input_ids: torch.Tensor,
        pages: torch.Tensor,
        starts: torch.Tensor,
        counts: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        q, k, v = (table[input_ids] for table in self.tables)
        lengths = ops.kv_append.overload(keys, values, k, v, pages, starts, counts, 0, [0, 0])
        y: torch.Tensor = ops.paged_attention.overload(
            q, keys, values, pages, lengths, counts, 0, 4, 0, 1.0, self.window
        )
        return y

    def program(self) -> ProgramSet:
        cache = CacheShape(1, 2, self.dim).zeros(TOKENS // PAGE)
        pages = torch.arange(TOKENS // PAGE, dtype=torch.int32)[None]
        count = torch.tensor([TOKENS])
        given = (torch.arange(TOKENS)[None], pages, count * 0, count, *cache)
        return ProgramSet.single(torch.export.export(self, given), "prefill")


@pytest.mark.parametrize(
    "looks", [("line", "near", "block", "line"), ("near", "block", "line", "near")]
)
def test_each_head_gets_the_pattern_that_it_was_made_for(looks: tuple[str, ...]) -> None:
    """Near keys all patterns find: of equal ones the cheapest is taken."""
    made_for = {"line": "vertical_slash", "near": "a_shape", "block": "block_sparse"}
    numbers = {"near": 0, "line": 1, "block": 2}
    text = Calibration([torch.arange(TOKENS)])
    recipe = sparsify.MInference(0.6, calibration=text, budget_error=0.02, last_tokens=TOKENS)
    result = run_pipeline(Constructed(looks).program(), [recipe])
    prefill = result.programs["prefill"]
    (selection,) = calls(prefill, "select_blocks")
    (patterns,) = arguments(selection)["tensors"]
    assert prefill.weight_of(patterns).tolist() == [numbers[name] for name in looks]
    (told,) = (d.reason for d in result.decisions if d.operator == "attention patterns")
    for name in set(looks):
        heads = [head for head, own in enumerate(looks) if own == name]
        plural = "s" * (len(heads) > 1)
        listed = ", ".join(map(str, heads))
        assert f"{len(heads)} head{plural} {made_for[name]} ({listed})" in told
    assert "mean error" in told
    # No pattern alone keeps the budget.
    for name in made_for.values():
        alone = replace(recipe, patterns={0: [name] * 4})
        with pytest.raises(BudgetError, match="head"):
            run_pipeline(Constructed(looks).program(), [alone])


@pytest.mark.parametrize("last_tokens, name", [(4, "vertical_slash"), (TOKENS, "block_sparse")])
def test_the_last_tokens_of_a_text_choose(last_tokens: int, name: str) -> None:
    text = Calibration([torch.arange(TOKENS)])
    recipe = sparsify.MInference(0.4, calibration=text, last_tokens=last_tokens)
    result = run_pipeline(Constructed(("asks", "line", "asks", "line")).program(), [recipe])
    (told,) = (d.reason for d in result.decisions if d.operator == "attention patterns")
    heads = [0, 1, 2, 3] if name == "vertical_slash" else [0, 2]
    assert f"{len(heads)} heads {name} ({', '.join(map(str, heads))})" in told


@pytest.fixture(scope="module")
def llama() -> ProgramSet:
    return portable_programs("llama")


def test_prefill_selects_by_patterns_and_decode_does_not(llama: ProgramSet) -> None:
    result = run_pipeline(llama, [RECIPE])
    assert not calls(result.programs["decode"], "select_blocks")
    prefill = result.programs["prefill"]
    selections, attentions = calls(prefill, "select_blocks"), calls(prefill, "paged_attention")
    assert [arguments(n)["selected"] for n in attentions] == selections and len(selections) == 2
    assert {arguments(n)["selector"] for n in selections} == {"head_patterns"}
    names = sorted(n for n in result.programs.weights if n.endswith(".patterns"))
    assert names == [f"layers.{layer}.attention.patterns" for layer in (0, 1)]
    told = [d for d in result.decisions if d.operator == "attention patterns"]
    assert [d.site for d in told] == [f"prefill.layers.{layer}.attention" for layer in (0, 1)]
    # What is always read is all of a short prompt, and not of a long one.
    for length, same in ((40, True), (300, False)):
        before, after = logits(llama, length), logits(result.programs, length)
        assert torch.allclose(before, after, atol=1e-5, rtol=1e-5) == same


def test_no_pattern_for_all_heads_is_better_where_it_was_searched(llama: ProgramSet) -> None:
    """In the first layer, which sees what it saw in the search, head by head."""

    def errors(recipe: sparsify.MInference) -> list[float]:
        decisions = run_pipeline(llama, [recipe]).decisions
        heads = [d for d in decisions if d.operator == "attention head" and "layers.0" in d.site]
        return [float(d.error or 0.0) for d in heads]

    best = errors(replace(RECIPE, last_tokens=200))
    for name in ("a_shape", "vertical_slash", "block_sparse"):
        alone = errors(replace(RECIPE, patterns={0: [name] * 4, 1: [name] * 4}))
        assert len(best) == len(alone) == 4
        assert all(own <= other + 1e-9 for own, other in zip(best, alone, strict=True))


@pytest.mark.slow
def test_compiled_prefill_is_the_eager_one(llama: ProgramSet) -> None:
    recipe = sparsify.MInference(
        **SMALL, skip_below=30.0, calibration=TEXTS,
        patterns={0: ("a_shape", "vertical_slash", "block_sparse", "a_shape"),
                  1: ("vertical_slash", "vertical_slash", "a_shape", "block_sparse")},
    )  # fmt: skip
    lm = sparsify.compile(MODELS["llama"](), recipe=recipe, num_threads=2, cache=False)
    plan = lm.compiled.entry("prefill").plan
    assert all(region.kind == "compiled" for region in plan.regions)
    programs = run_pipeline(llama, [recipe]).programs
    ids = torch.arange(300)[None] % 61
    found = lm(ids, lm.new_cache(1, 300))
    torch.testing.assert_close(found, logits(programs, 300), atol=1e-4, rtol=1e-4)
    # Behind 512 tokens, which come at once, the rest of a prompt is a chunk of its own.
    assert lm.generate(prompts(61, [600]), max_new_tokens=4).shape == (1, 604)


@pytest.mark.parametrize("window, options", [(8, {}), (0, {"skip": ("*layers.0.*",)})])
def test_what_is_not_rewritten_is_not_searched(window: int, options: dict[str, Any]) -> None:
    """So texts that are too short for a search are none."""
    program = Constructed(("line", "near", "block", "line"), window).program()
    short = Calibration([torch.arange(9)])
    result = run_pipeline(program, [sparsify.MInference(calibration=short, **options)])
    assert not calls(result.programs["prefill"], "select_blocks")
    assert [d.verdict for d in result.decisions] == ["skipped"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give calibration texts"),
        ({"calibration": TEXTS, "last_tokens": 0}, "last_tokens=0 must be at least 1"),
        ({"patterns": {0: ["a_shape", "dilated"]}}, "'dilated' for a head of layer 0; there are"),
        ({"patterns": {0: ["a_shape"] * 3}}, "3 names for layer 0, which has 4 query heads"),
        ({"patterns": {0: ["a_shape"] * 4}}, "0 names for layer 1, which has 4"),
        ({"calibration": Calibration([torch.arange(20), torch.arange(30)])}, "have 30, 20 tokens"),
    ],
)
def test_what_is_missing_is_named(llama: ProgramSet, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_pipeline(llama, [sparsify.MInference(**options)])


def test_a_budget_is_kept(llama: ProgramSet) -> None:
    with pytest.raises(BudgetError, match="head"):
        run_pipeline(llama, [replace(RECIPE, budget_error=1e-3)])
