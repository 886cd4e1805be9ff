"""transformers' own generate over compiled programs."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, TextStreamer


@pytest.fixture(scope="module")
def adapted(pair: Any) -> Any:
    model, compiled = pair("llama")
    return model, compiled.as_transformers()


@pytest.fixture
def batch(tiny_lm: Any) -> dict[str, torch.Tensor]:
    """Padded on the left, as transformers wants it."""
    prompts = tiny_lm.prompts(61, (4, 11))
    ids = torch.zeros(2, 11, dtype=torch.int64)
    ids[0, 7:], ids[1] = prompts
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
def test_greedy(adapted: Any, batch: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    model, ours = adapted
    found, expected = (
        m.generate(**batch, max_new_tokens=20, do_sample=False, **options) for m in (ours, model)
    )
    assert torch.equal(found, expected)


def test_sampled(adapted: Any, batch: dict[str, torch.Tensor]) -> None:
    results = []
    for model in adapted:
        torch.manual_seed(5)
        results.append(model.generate(**batch, max_new_tokens=12, do_sample=True, top_k=8))
    assert torch.equal(*results)


def test_a_conversation_goes_on_from_its_cache(adapted: Any, tiny_lm: Any) -> None:
    results = []
    for model in adapted:
        (prompt,) = tiny_lm.prompts(61, [6])
        first = model.generate(
            prompt[None], max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
        longer = torch.cat([first.sequences, prompt[None, :3]], 1)
        second = model.generate(
            longer, max_new_tokens=5, do_sample=False, past_key_values=first.past_key_values
        )
        results.append(second)
    assert torch.equal(*results)


def test_streamers_see_every_token(adapted: Any, batch: dict[str, torch.Tensor]) -> None:
    class Numbers:
        def decode(self, ids: Any, **_: Any) -> str:
            return " ".join(map(str, ids)) + "\n"

    seen: list[str] = []

    class Listener(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            seen.append(text)

    ids = batch["input_ids"][1:]
    found = adapted[1].generate(ids, max_new_tokens=4, streamer=Listener(Numbers(), True))
    assert "".join(seen).split() == [str(token) for token in found[0, ids.shape[1] :].tolist()]


def test_beam_search_is_refused(adapted: Any, batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(NotImplementedError, match="use num_beams=1"):
        adapted[1].generate(**batch, max_new_tokens=4, num_beams=2)


def test_a_foreign_cache_is_refused(adapted: Any) -> None:
    with pytest.raises(ValueError, match="past_key_values is DynamicCache"):
        adapted[1](torch.ones(1, 2, dtype=torch.int64), past_key_values=DynamicCache())


def test_embeddings_are_refused(adapted: Any) -> None:
    with pytest.raises(ValueError, match="takes input_ids, not inputs_embeds"):
        adapted[1](inputs_embeds=torch.zeros(1, 2, 24))
