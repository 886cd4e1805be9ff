"""The real Gemma 3 270m from end to end: layers with a window among full ones, tied embeddings."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

TOLERANCE = 2e-5
"""Of the logits' scale, against float64."""
NEW = 64
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
]


@pytest.fixture(scope="module")
def lm(checkpoints: ModuleType, language_model: Any) -> Any:
    try:
        model = checkpoints.GEMMA3.load()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    return language_model.of(model, checkpoints.GEMMA3.tokenizer())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("text", PROMPTS)
def test_greedy_tokens_are_those_of_transformers(lm: Any, text: str) -> None:
    prompt = lm.prompt(text)
    expected, _ = lm.own(prompt, NEW)
    assert expected.shape[1] == prompt.shape[1] + NEW
    assert lm.continued(prompt, NEW).tolist() == expected.tolist()


@pytest.mark.parametrize("length", [100, 505, 1200])
def test_logits_within_and_beyond_the_window_agree_with_float64(lm: Any, length: int) -> None:
    """Of prompts, and of tokens after them, that end before, at and behind token 512."""
    assert lm.eager.config.sliding_window == 512
    sequence = lm.long_prompt(length + 16)
    assert error(lm.logits(sequence, 16), lm.exact_logits(sequence, 16)) <= TOLERANCE


def test_greedy_tokens_beyond_the_window(lm: Any) -> None:
    prompt = lm.long_prompt(1200)
    expected, _ = lm.own(prompt, 24)
    assert lm.continued(prompt, 24).tolist() == expected.tolist()


def test_rows_on_both_sides_of_the_window_are_like_each_alone(lm: Any) -> None:
    rows = [lm.long_prompt(700)[0, :length] for length in (700, 3, 511)]
    together = lm.continued(rows, 16)[:, 700:]
    for row, found in zip(rows, together, strict=True):
        expected, _ = lm.own(row[None], 16)
        assert found.tolist() == expected[0, len(row) :].tolist()


def test_both_programs_are_compiled_whole(lm: Any) -> None:
    assert lm.compiled.report.fallbacks == ()
    for name in ("prefill", "decode"):
        kinds = [region.kind for region in lm.compiled.compiled.entry(name).plan.regions]
        assert kinds == ["compiled"]


def test_tied_embeddings_are_in_memory_once(lm: Any) -> None:
    assert lm.compiled.nbytes <= 1.05 * lm.dense_bytes
