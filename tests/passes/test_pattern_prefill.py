"""Patterns in the prefill of a language model: which blocks are selected, and what it computes."""

from itertools import pairwise
from typing import Any

import pytest
import torch

import sparsify
from sparsify.calibration import Calibration
from sparsify.contracts import PassContext
from sparsify.ops import PAGE, CacheShape
from sparsify.passes.attention_mixture import AttentionMixture
from sparsify.passes.attention_trust import BudgetError
from sparsify.passes.graph import arguments
from sparsify.passes.pattern_attention import PatternAttention
from sparsify.patterns import Pattern, Sharded, Strided, WindowSinks
from sparsify.program import ProgramSet
from tests.tiny_lm import MODELS, portable_programs

BLOCK, HEADS = 32, 4


@pytest.fixture
def programs() -> ProgramSet:
    torch.manual_seed(0)
    return portable_programs("llama")


def attentions(programs: ProgramSet, name: str) -> list[Any]:
    nodes = [n for n in programs[name].graph.nodes if "paged_attention" in str(n.target)]
    return [arguments(node) for node in nodes]


@pytest.mark.parametrize("pattern", [Strided(0, 3), Sharded(3, 0)], ids=lambda p: p.name)
@pytest.mark.parametrize("tokens", [1, 33, 150])
def test_prefill_selects_what_the_pattern_keeps(
    pattern: Pattern, tokens: int, programs: ProgramSet
) -> None:
    result = PatternAttention(pattern, block=BLOCK).run(programs, PassContext())
    program = result.programs["prefill"]
    nodes = {o["selected"] for o in attentions(result.programs, "prefill")}
    assert len(nodes) == 1, "all layers share one selection"
    seen: list[torch.Tensor] = []
    Calibration([torch.randint(0, 60, (tokens,))]).run(
        program, lambda _, lists: seen.append(lists), nodes
    )
    blocks = -(-tokens // BLOCK)
    marks = pattern.marks(blocks, HEADS).tril()
    (lists,) = seen
    assert lists.shape[:3] == (1, *marks.shape[:2])
    for own, found in zip(marks.flatten(0, 1), lists.flatten(0, 2).tolist(), strict=True):
        expected = own.nonzero()[:, 0].tolist()
        assert found == expected + [-1] * (len(found) - len(expected))


def test_an_example_of_one_block_leaves_their_number_open(programs: ProgramSet) -> None:
    """The example prompt has 64 tokens, those of a block by default."""
    result = PatternAttention(Sharded(3, 0)).run(programs, PassContext())
    for options in attentions(result.programs, "prefill"):
        batch, heads, rows, columns = options["selected"].meta["val"].shape
        assert heads == HEADS and options["block"][0] == 64
        assert all(isinstance(extent, torch.SymInt) for extent in (batch, rows, columns))


def test_a_prompt_in_pieces_reads_the_same_blocks(programs: ProgramSet) -> None:
    result = PatternAttention(Sharded(3, 0), block=BLOCK).run(programs, PassContext())
    program, ids = result.programs["prefill"], torch.randint(0, 60, (1, 170))
    (shape,) = [n.meta["val"].shape for n in program.user_inputs() if n.name == "keys"]
    width = -(-170 // PAGE)
    pages = torch.arange(width, dtype=torch.int32)[None]

    def last(*ends: int) -> torch.Tensor:
        cache = CacheShape(int(shape[0]), int(shape[2]), int(shape[3])).zeros(width)
        for begin, end in pairwise((0, *ends)):
            given = ids[:, begin:end], pages, torch.tensor([begin]), torch.tensor([end - begin])
            logits: torch.Tensor = program.run(*given, *cache)[0]
        return logits

    torch.testing.assert_close(last(64, 170), last(170), atol=1e-4, rtol=1e-4)


def test_decode_is_left_alone_and_says_so(programs: ProgramSet) -> None:
    result = PatternAttention(Strided(), block=BLOCK).run(programs, PassContext())
    assert all(o["selected"] is None for o in attentions(result.programs, "decode"))
    reasons = [d.reason for d in result.decisions if d.site.startswith("decode")]
    assert reasons and all("this is one token" in reason for reason in reasons)


def test_layers_that_are_switched_off_are_left_alone(programs: ProgramSet) -> None:
    context = PassContext(disabled_sites=frozenset({"prefill.layers.0.*"}))
    result = PatternAttention(Strided(), block=BLOCK).run(programs, context)
    first, *others = [d for d in result.decisions if d.site.startswith("prefill")]
    assert first.verdict == "skipped" and "switched off" in first.reason
    assert all(d.verdict == "rewritten" for d in others)
    first, *others = [o["selected"] for o in attentions(result.programs, "prefill")]
    assert first is None and None not in others


def test_a_mixture_says_that_it_is_not_for_the_cache(programs: ProgramSet) -> None:
    recipe = AttentionMixture((Strided(),), 0.5, Calibration([[1, 2, 3]]))
    with pytest.raises(ValueError, match="over the cache of a language model is not served"):
        recipe.run(programs, PassContext())


def test_a_budget_names_layer_and_head(programs: ProgramSet) -> None:
    texts = Calibration([torch.randint(0, 60, (130,))])
    recipe = PatternAttention(WindowSinks(0, 0), BLOCK, calibration=texts, budget_error=1e-3)
    with pytest.raises(BudgetError, match=r"head \d of prefill\.layers\.\d\.attention"):
        recipe.run(programs, PassContext())


@pytest.mark.slow
def test_the_compiled_model_reads_the_same() -> None:
    """A prompt, then a second one behind it that starts inside a block."""
    torch.manual_seed(0)
    model = MODELS["llama"]()
    recipe = PatternAttention(Sharded(3, 0), block=BLOCK)
    compiled = sparsify.compile(model, recipe=recipe, num_threads=1)
    assert compiled.report.fallbacks == ()
    ids = torch.randint(0, 60, (1, 170))
    for first in (130, 64):
        cache = compiled.new_cache(1, 170)
        compiled(ids[:, :first], cache)
        found = compiled(ids[:, first:], cache)
        expected = _logits(model, ids, first)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_default_block_serves_any_prompt() -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]()
    compiled = sparsify.compile(model, recipe=PatternAttention(Sharded(3, 0)), num_threads=1)
    for tokens in (1, 64, 300):
        ids = torch.randint(0, 60, (1, tokens))
        found = compiled(ids, compiled.new_cache(1, tokens))
        expected = _logits(model, ids, tokens, block=64)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_prompt_reads_the_same_in_a_batch() -> None:
    """Three long prompts run in chunks, one alone does not."""
    torch.manual_seed(0)
    recipe = PatternAttention(Sharded(3, 0), block=BLOCK)
    compiled = sparsify.compile(MODELS["llama"](), recipe=recipe, num_threads=1)
    counts = torch.tensor([321, 400, 64])
    ids = torch.randint(0, 60, (3, 400))
    together = compiled(ids, compiled.new_cache(3, 400), counts)
    for row, count in enumerate(counts.tolist()):
        alone = compiled(ids[row : row + 1, :count], compiled.new_cache(1, count))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def _logits(model: Any, ids: torch.Tensor, first: int, block: int = BLOCK) -> torch.Tensor:
    """Of the last token by the model itself, with the pattern as a mask of each head."""
    total = ids.shape[1]
    at = torch.arange(total)
    query = torch.where(at < first, at // block, (first + (at - first) // block * block) // block)
    start = torch.where(at < first, at // block * block, first + (at - first) // block * block)
    key, head = at // block, torch.arange(HEADS)[:, None, None]
    kept = Sharded(3, 0).keep(query[:, None], key, head)
    last = (start + block - 1) // block
    kept = kept | ((key >= query[:, None]) & (key <= last[:, None]))
    seen = kept & (at <= at[:, None])
    model.config._attn_implementation = "sdpa"
    with torch.no_grad():
        mask = torch.where(seen, 0.0, -torch.inf)[None]
        return model(ids, attention_mask=mask, use_cache=False).logits[:, -1]  # type: ignore[no-any-return]
