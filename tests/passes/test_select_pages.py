"""Recipes that select pages for decode: graphs, decisions, eager results, generation."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsify
from sparsify.calibration import Calibration
from sparsify.contracts import PassContext
from sparsify.frontend.causal_lm import import_causal_lm
from sparsify.ops import PAGE, CacheShape
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.double_sparsity import important_channels
from sparsify.passes.graph import arguments
from sparsify.passes.select_pages import PageSelection
from sparsify.program import Program, ProgramSet
from tests.tiny_lm import MODELS, SIZES, own_tokens, paged_tokens, portable_programs, prompts

TEXTS = Calibration([torch.arange(50) % 61, torch.arange(20) * 7 % 61])
SMALL: dict[str, Any] = {"budget": 48, "skip": ()}
RECIPES: dict[str, PageSelection] = {
    "quest": sparsify.Quest(**SMALL),
    "double_sparsity": sparsify.DoubleSparsity(**SMALL, calibration=TEXTS, channels=2),
    "tidal_decode": sparsify.TidalDecode(**SMALL, selecting=(0,)),
    "streaming_window": sparsify.StreamingWindow(**SMALL),
}


@pytest.fixture(scope="module")
def llama() -> ProgramSet:
    return portable_programs("llama")


def calls(program: Program, name: str) -> list[Any]:
    return [n for n in program.graph.nodes if f"sparsify.{name}." in str(n.target)]


@pytest.mark.parametrize("name", RECIPES)
def test_decode_selects_and_prefill_does_not(llama: ProgramSet, name: str) -> None:
    result = run_pipeline(llama, [RECIPES[name]], PassContext())
    decode, prefill = result.programs["decode"], result.programs["prefill"]
    assert not calls(prefill, "select_pages")
    selections, attentions = calls(decode, "select_pages"), calls(decode, "paged_attention")
    if name == "tidal_decode":
        assert len(selections) == 1
        assert [arguments(n)["selected"] for n in attentions] == [None, *selections]
    else:
        assert [arguments(n)["selected"] for n in attentions] == selections and len(selections) == 2
    sites = {d.site: d.verdict for d in result.decisions if d.operator == "attention"}
    assert sites == {
        **{f"prefill.layers.{layer}.attention": "skipped" for layer in (0, 1)},
        **{f"decode.layers.{layer}.attention": "rewritten" for layer in (0, 1)},
    }
    kept = ["bounds"] if name == "quest" else []
    for program in result.programs:
        assert [n.name for n in program.state()] == ["keys", "values", *kept]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("length", [20, 100])
def test_a_budget_of_the_whole_context_changes_nothing(
    llama: ProgramSet, name: str, length: int
) -> None:
    """48 tokens are all of the shorter context; of the longer they are not."""
    shape = CacheShape(2, 2, 6)
    rewritten = run_pipeline(llama, [RECIPES[name]]).programs
    found = []
    for programs in (llama, rewritten):
        width = length // PAGE + 1
        keys, values = shape.zeros(width)
        pages = torch.randperm(width, generator=torch.Generator().manual_seed(2))[None].int()
        beside = {
            node.name: torch.full((2, width, *node.meta["val"].shape[2:]), torch.nan)
            for node in programs["decode"].state()
            if node.name == "bounds"
        }
        logits = []
        ids, start = torch.arange(length)[None] % 61, torch.tensor([0])
        for entry, piece in (
            ("prefill", ids[:, :-3]),
            *(("decode", ids[:, -i:][:, :1]) for i in (3, 2, 1)),
        ):
            count = torch.tensor([piece.shape[1]])
            given = (piece, pages, start, count, keys, values)
            logits.append(programs[entry].run(*given, **beside))
            start = start + count
        found.append(torch.cat(logits))
    same = torch.isclose(*found, atol=1e-5, rtol=1e-5).all(1).tolist()
    assert same == ([True] * 4 if length == 20 else [True, False, False, False])


@pytest.mark.parametrize(
    "name",
    [
        "quest",
        "tidal_decode",
        pytest.param("double_sparsity", marks=pytest.mark.slow),
        pytest.param("streaming_window", marks=pytest.mark.slow),
    ],
)
def test_generation_with_a_recipe(llama: ProgramSet, name: str, tmp_path: Any) -> None:
    """Kernels and eager references agree from text to text, in this process and from a file."""
    model = MODELS["llama"]()
    compiled = sparsify.compile(model, recipe=RECIPES[name], num_threads=2, cache=False)
    assert [r.kind for r in compiled.compiled.entry("decode").plan.regions] == ["compiled"]
    short, long = prompts(61, [10, 150])
    assert compiled.generate([short], max_new_tokens=12)[0, 10:].tolist() == own_tokens(
        model, short, 12
    )
    rows = compiled.generate([long, short], max_new_tokens=8)
    eager = run_pipeline(llama, [RECIPES[name]]).programs
    expected = paged_tokens(eager, CacheShape(2, 2, 6), [long, short], 8, 256)
    assert rows[:, 150:].tolist() == expected
    compiled.save(tmp_path / "model.sparsify")
    again = sparsify.load(tmp_path / "model.sparsify")
    assert torch.equal(again.generate([long, short], max_new_tokens=8), rows)


def test_layers_that_are_skipped_and_layers_with_a_window() -> None:
    programs = portable_programs("gemma3")
    result = run_pipeline(programs, [sparsify.Quest(budget=48, skip="*layers.0.*")])
    assert len(calls(result.programs["decode"], "select_pages")) == 1
    reasons = [d.reason for d in result.decisions if d.site.startswith("decode")]
    assert "skips *layers.0.*" in reasons[0] and "window of 5 tokens" in reasons[2]
    again = run_pipeline(result.programs, [sparsify.StreamingWindow(budget=48, skip="*layers.0.*")])
    assert "another recipe" in [d.reason for d in again.decisions if d.site.startswith("decode")][1]


def test_prefill_keeps_the_state_of_the_layers_that_select(llama: ProgramSet) -> None:
    recipe = sparsify.Quest(budget=48, sites="decode.layers.1.*", skip=())
    for off in (frozenset(), frozenset({"prefill.*"})):
        programs = run_pipeline(llama, [recipe], PassContext(disabled_sites=off)).programs
        for program, operator in (("decode", "select_pages"), ("prefill", "page_bounds")):
            (call,) = calls(programs[program], operator)
            assert arguments(call)["layer"] == 1


def test_layers_that_share_a_selection_say_whose() -> None:
    sizes = {**SIZES, "num_hidden_layers": 5}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    programs = run_pipeline(import_causal_lm(model), PORTABLE).programs
    recipe = sparsify.TidalDecode(48, skip=(), selecting=(1, 3))
    for switched_off, sources in (("", [None, None, 1, None, 3]), ("*.1.*", [None] * 4 + [3])):
        off = PassContext(disabled_sites=frozenset(filter(None, [switched_off])))
        result = run_pipeline(programs, [recipe], off)
        decode = result.programs["decode"]
        selections = {arguments(n)["layer"]: n for n in calls(decode, "select_pages")}
        read = [arguments(n)["selected"] for n in calls(decode, "paged_attention")]
        assert read == [selections.get(source) for source in sources]
        told = [d for d in result.decisions if d.site.startswith("decode")]
        for layer, (decision, source) in enumerate(zip(told, sources, strict=True)):
            rewritten = source is not None or layer in selections
            assert decision.verdict == ("rewritten" if rewritten else "skipped")
            assert source is None or f"layer {source} selected" in decision.reason


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("llama", {"selecting": (0, 2)}, "layer 2 cannot select, the model's layers are 0 to 1"),
        ("llama", {"selecting": (0,), "skip": "*layers.0.*"}, "layer 0 .* recipe skips"),
        ("llama", {"selecting": (0, 1)}, "layer 0 cannot select, no layer behind it"),
        ("gemma3", {"selecting": (0,)}, "layer 0 cannot select, it reads a window"),
        ("gemma3", {"selecting": (1,)}, "layer 1 cannot select, no layer behind it"),
    ],
)
def test_layers_that_cannot_select_are_refused(
    model: str, options: dict[str, Any], message: str
) -> None:
    recipe = sparsify.TidalDecode(**{**SMALL, **options})
    with pytest.raises(ValueError, match=message):
        run_pipeline(portable_programs(model), [recipe])


def test_important_channels_tell_keys_apart(llama: ProgramSet) -> None:
    program, text = llama["prefill"], Calibration([torch.arange(30) % 61])
    append, attention = (arguments(calls(program, n)[0]) for n in ("kv_append", "paged_attention"))
    seen: list[torch.Tensor] = []
    text.run(program, lambda _, value: seen.append(value), [append["key"]])
    total = torch.zeros(2, 6)
    for head in range(4):
        q = seen[0][0, :, attention["offset"] + head * 6 :][:, :6]
        k = seen[0][0, :, append["offsets"][0] + head // 2 * 6 :][:, :6]
        # How much the products of one query differ from key to key, for all queries.
        total[head // 2] += (q[:, None] * k).std(1).mean(0)
    found = important_channels(program, text, 2)[0]
    assert found.dtype == torch.int32
    assert found.tolist() == total.topk(2).indices.sort().values.tolist()


@pytest.mark.parametrize("bound_keys", [4, 8, 16])
def test_bounds_are_kept_for_as_many_keys_as_asked(llama: ProgramSet, bound_keys: int) -> None:
    recipe = sparsify.Quest(**SMALL, bound_keys=bound_keys, calibration=TEXTS)
    result = run_pipeline(llama, [recipe])
    for program in result.programs:
        (bounds,) = (n for n in program.state() if n.name == "bounds")
        assert bounds.meta["val"].shape[2:] == (2, 2, 6, PAGE // bound_keys)
    reasons = {d.reason for d in result.decisions if d.site == "decode.layers.0.attention"}
    assert any(f"page_bounds of {bound_keys} keys" in reason for reason in reasons)
    heads = [d for d in result.decisions if d.operator == "attention head"]
    assert heads and all(d.error is not None for d in heads)


def test_recipes_agree_on_what_has_bounds(llama: ProgramSet) -> None:
    first = sparsify.Quest(**{**SMALL, "skip": ("*layers.1.*",)}, bound_keys=4)
    second = sparsify.Quest(**{**SMALL, "skip": ("*layers.0.*",)}, bound_keys=16)
    with pytest.raises(ValueError, match="keeps bounds of 4 keys in this cache, this one needs"):
        run_pipeline(llama, [first, second])
    both = run_pipeline(llama, [first, replace(second, bound_keys=4)])
    assert len(calls(both.programs["decode"], "select_pages")) == 2


@pytest.mark.parametrize("name", RECIPES)
def test_layers_that_are_switched_off_are_not_judged(llama: ProgramSet, name: str) -> None:
    recipe = replace(RECIPES[name], calibration=TEXTS)
    layer = 1 if name == "tidal_decode" else 0
    off = PassContext(disabled_sites=frozenset({f"decode.layers.{layer}.*"}))
    judged = {d.site for d in run_pipeline(llama, [recipe], off).decisions if d.error is not None}
    assert not any(site.startswith(f"decode.layers.{layer}.") for site in judged)
    assert bool(judged) == (name != "tidal_decode")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 40}, "multiple of 16"),
        ({"budget": 0}, "multiple of 16"),
        ({"budget": 32}, "leaves nothing to choose"),
        ({"sinks": 600}, "leaves nothing to choose"),
        ({"recent": 0}, "at least 1"),
        ({"sinks": -1}, "at least 0"),
        ({"bound_keys": 5}, "must be one of 16, 8, 4"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify.Quest(**options)


@pytest.mark.parametrize(
    "recipe", [sparsify.Quest, sparsify.DoubleSparsity, sparsify.TidalDecode, sparsify.PooledBlocks]
)
def test_texts_that_are_no_calibration_are_refused(recipe: Any) -> None:
    with pytest.raises(TypeError, match=rf"{recipe.__name__}: calibration must be .*not list"):
        recipe(calibration=[[1, 2, 3]])


@pytest.mark.parametrize(
    "recipe", [*RECIPES.values(), sparsify.PooledBlocks(), sparsify.FlexPrefill()]
)
def test_a_recipe_for_a_cache_is_refused_by_a_model_without_one(recipe: Any) -> None:
    model = torch.nn.Linear(3, 3).eval()
    with pytest.raises(ValueError, match=f"{type(recipe).__name__}: .*without example inputs"):
        sparsify.compile(model, (torch.randn(2, 3),), recipe=recipe, cache=False)
