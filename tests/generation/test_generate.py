"""Compiled language models give the tokens that transformers gives."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import sparsify
from sparsify.generation import CacheFull, TextSettings
from sparsify.ops import CHUNK_TOKENS, chunk_bounds

NEW = 24
LENGTHS = (3, 21, 1)


@pytest.fixture(params=["llama", "gemma3", "gemma2"])
def both(request: pytest.FixtureRequest, pair: Any) -> Any:
    return pair(request.param)


@pytest.fixture
def llama(pair: Any) -> Any:
    return pair("llama")


def padded(prompts: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(None, len(prompt)) if side == "right" else slice(longest - len(prompt), None)
        ids[row, place] = prompt
        mask[row, place] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_of_different_lengths_decode_like_each_alone(
    both: Any, tiny_lm: Any, side: str
) -> None:
    model, compiled = both
    prompts = tiny_lm.prompts(61, LENGTHS)
    ids, mask = padded(prompts, side)
    found = compiled.generate(ids, attention_mask=mask, max_new_tokens=NEW)
    assert torch.equal(found[:, : ids.shape[1]], ids)
    for row, prompt in enumerate(prompts):
        assert found[row, ids.shape[1] :].tolist() == tiny_lm.own_tokens(model, prompt, NEW)


def test_both_programs_are_compiled_whole_over_one_copy_of_the_weights(both: Any) -> None:
    model, compiled = both
    for name in ("prefill", "decode"):
        assert [r.kind for r in compiled.compiled.entry(name).plan.regions] == ["compiled"]
    assert not compiled.report.fallbacks
    dense = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    assert compiled.nbytes < 1.05 * dense


def test_prompts_may_come_in_pieces(both: Any, tiny_lm: Any) -> None:
    _, compiled = both
    (prompt,) = tiny_lm.prompts(61, [40])
    whole = compiled(prompt[None], compiled.new_cache(1, 40))
    cache = compiled.new_cache(1, 40)
    for piece in prompt.split([7, 1, 16, 16]):
        logits = compiled(piece[None], cache)
    assert cache.lengths.tolist() == [40]
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("length", [1, 63, 64, 65, 300, 513, 2049])
def test_prompts_are_cut_at_blocks(rows: int, length: int) -> None:
    bounds = chunk_bounds(length, rows)
    assert bounds[0] == 0 and bounds[-1] == length
    assert all(bound % 64 == 0 for bound in bounds[:-1])
    assert all(0 < end - begin <= CHUNK_TOKENS // rows for begin, end in pairwise(bounds))


def test_long_prompts_run_in_chunks(
    both: Any, tiny_lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, compiled = both
    prompts = tiny_lm.prompts(61, (150, 3, 65))
    whole = compiled.generate(prompts, max_new_tokens=4)
    monkeypatch.setattr("sparsify.ops.chunks.CHUNK_TOKENS", 192)
    assert chunk_bounds(150, 3) == [0, 64, 128, 150]
    assert torch.equal(compiled.generate(prompts, max_new_tokens=4), whole)


def test_many_rows_decode_together(llama: Any, tiny_lm: Any) -> None:
    model, compiled = llama
    prompts = tiny_lm.prompts(61, range(1, 12))
    found = compiled.generate(prompts, max_new_tokens=4)
    for row, prompt in enumerate(prompts):
        assert found[row, 11:].tolist() == tiny_lm.own_tokens(model, prompt, 4)


def test_a_row_ends_at_its_end_token(llama: Any, tiny_lm: Any) -> None:
    model, compiled = llama
    prompts = tiny_lm.prompts(61, (5, 6))
    tokens = [tiny_lm.own_tokens(model, prompt, NEW) for prompt in prompts]
    end = tokens[0][3]
    found = compiled.generate(prompts, max_new_tokens=NEW, eos_token_id=end)[:, 6:]
    for row, own in zip(found.tolist(), tokens, strict=True):
        length = own.index(end) + 1 if end in own else NEW
        assert row[:length] == own[:length]
        assert not any(row[length:])


def test_tokens_stream_as_they_come(llama: Any, tiny_lm: Any) -> None:
    model, compiled = llama
    (prompt,) = tiny_lm.prompts(61, [4])
    own = tiny_lm.own_tokens(model, prompt, 5)
    stream = compiled.stream(prompt[None], max_new_tokens=5)
    assert [int(tokens) for tokens in stream] == own

    class Streamer:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value.tolist())

        def end(self) -> None:
            self.seen.append("end")

    streamer = Streamer()
    compiled.generate(prompt[None], max_new_tokens=5, streamer=streamer)
    assert streamer.seen == [prompt[None].tolist(), *([t] for t in own), "end"]


def test_sampling_follows_its_seed(llama: Any, tiny_lm: Any) -> None:
    _, compiled = llama
    prompts = tiny_lm.prompts(61, (4, 9))
    options = {"do_sample": True, "max_new_tokens": 12}
    first, again, other = (compiled.generate(prompts, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    streamed = torch.stack(
        list(compiled.stream(prompts, max_new_tokens=12, do_sample=True, seed=1)), 1
    )
    assert torch.equal(streamed, first[:, 9:])


@pytest.mark.parametrize("trusted", [True, False])
def test_a_saved_model_generates_the_same(
    llama: Any, tiny_lm: Any, tmp_path: Path, trusted: bool
) -> None:
    _, compiled = llama
    path = tmp_path / "llama.sparsify"
    compiled.save(path)
    loaded = sparsify.load(path, trusted=trusted)
    assert loaded.settings == compiled.settings
    prompts = tiny_lm.prompts(61, LENGTHS)
    expected = compiled.generate(prompts, max_new_tokens=NEW)
    assert torch.equal(loaded.generate(prompts, max_new_tokens=NEW), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_positions", "many"),
        ("max_positions", None),
        ("eos_token_ids", 3),
        ("eos_token_ids", ["end"]),
        ("pad_token_id", "0"),
        ("config", []),
        ("surprise", 1),
    ],
)
def test_odd_settings_are_named(field: str, value: object) -> None:
    record = TextSettings(32, (1, 2), 0, {"model_type": "llama"}).to_dict()
    assert TextSettings.from_dict(record).to_dict() == record
    record[field] = value
    if value is None:
        del record[field]
    with pytest.raises(sparsify.ArtefactError, match=rf"'{field}'"):
        TextSettings.from_dict(record)


def test_a_second_compilation_comes_from_the_cache(llama: Any) -> None:
    model, compiled = llama
    again = sparsify.compile(model, num_threads=2)
    assert again.report.facts["cached"]
    assert again.settings == compiled.settings


def test_pruned_weights_are_skipped_in_both_programs(tiny_lm: Any) -> None:
    model = sparsify.prune(tiny_lm.MODELS["llama"](), sparsify.Unstructured(0.8))
    compiled = sparsify.compile(model, num_threads=1)
    (prompt,) = tiny_lm.prompts(61, [30])
    found = compiled.generate(prompt[None], max_new_tokens=NEW)[0, 30:]
    assert found.tolist() == tiny_lm.own_tokens(model, prompt, NEW)


def test_a_full_cache_is_an_error_and_stays_as_it_was(llama: Any, tiny_lm: Any) -> None:
    _, compiled = llama
    (prompt,) = tiny_lm.prompts(61, [10])
    cache = compiled.new_cache(1, 12)
    compiled(prompt[None], cache)
    with pytest.raises(CacheFull, match="would hold 13 tokens"):
        compiled(prompt[None, :3], cache)
    assert cache.lengths.tolist() == [10]
    compiled(prompt[None, :2], cache)


def test_lengths_are_refused_before_anything_is_streamed(llama: Any) -> None:
    _, compiled = llama

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            raise AssertionError(f"was given {value}")

    with pytest.raises(ValueError, match="positions of the model"):
        compiled.generate([[1]], max_new_tokens=5000, streamer=Streamer())
    with pytest.raises(ValueError, match="positions of the model"):
        compiled.stream([[1]], max_new_tokens=5000)


def test_a_prompt_that_fails_half_way_leaves_the_cache_as_it_was(
    llama: Any, tiny_lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, compiled = llama
    monkeypatch.setattr("sparsify.ops.chunks.CHUNK_TOKENS", 64)
    assert chunk_bounds(150) == [0, 64, 128, 150]
    (prompt,) = tiny_lm.prompts(61, [150])
    wrong = prompt.clone()
    wrong[100] = 61
    cache = compiled.new_cache(1, 150)
    with pytest.raises(IndexError, match="outside the table"):
        compiled(wrong[None], cache)
    assert cache.lengths.tolist() == [0]
    again = compiled(prompt[None], cache)
    torch.testing.assert_close(again, compiled(prompt[None], compiled.new_cache(1, 150)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.new_cache(max_tokens=0), ValueError, "at least 1"),
        (lambda m: m.new_cache(max_tokens=10**6), ValueError, "positions of the model"),
        (lambda m: m.generate(torch.ones(1, 5)), TypeError, r"torch.float32; token ids are int64"),
        (lambda m: m.generate([[1]], max_new_tokens=0), ValueError, "must be at least 1"),
        (lambda m: m.generate([[1]], max_new_tokens=5000), ValueError, "positions of the model"),
        (lambda m: m.generate([[1, 99]]), IndexError, "outside the table of 61 rows"),
        (
            lambda m: m(torch.ones(2, 3, dtype=torch.int64), m.new_cache(1)),
            ValueError,
            r"shape \(2, 3\); the cache takes \[1, length\]",
        ),
        (
            lambda m: m(torch.ones(1, 3, dtype=torch.int64), m.new_cache(), torch.tensor([4])),
            ValueError,
            r"counts=\[4\]",
        ),
    ],
)
def test_wrong_calls_are_refused(llama: Any, call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call(llama[1])


def test_shapes_of_a_language_model_are_not_asked_for(tiny_lm: Any) -> None:
    with pytest.raises(ValueError, match="dynamic_shapes"):
        sparsify.compile(tiny_lm.MODELS["llama"](), dynamic_shapes=None)


def test_other_models_are_refused() -> None:
    model = BertModel(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(TypeError, match="example_inputs is needed"):
        sparsify.compile(model)
