"""The real SmolLM2-135M from end to end, dense and pruned: text, logits, memory, files."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import sparsify

pytestmark = pytest.mark.slow

TOLERANCE = 2e-5
"""Of the logits' scale, against float64."""
NEW = 64
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "<|im_start|>user\nWhy is the sky blue? Answer in a few sentences.<|im_end|>\n"
    "<|im_start|>assistant\n",
]


@pytest.fixture(scope="module", params=[0, 50, 80], ids="{}%".format)
def lm(
    request: pytest.FixtureRequest, smollm2: nn.Module, checkpoints: ModuleType, language_model: Any
) -> Any:
    model = copy.deepcopy(smollm2)
    if request.param:
        sparsify.prune(model, sparsify.Unstructured(request.param / 100), inplace=True)
    return language_model.of(model, checkpoints.SMOLLM2.tokenizer())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def is_pruned(lm: Any) -> bool:
    """The weights as they come hold some zeros too."""
    weight = lm.eager.model.layers[0].mlp.up_proj.weight
    return float((weight == 0).double().mean()) > 0.4


@pytest.mark.parametrize("text", PROMPTS)
def test_greedy_tokens_are_those_of_transformers(lm: Any, text: str) -> None:
    prompt = lm.prompt(text)
    expected, _ = lm.own(prompt, NEW)
    assert expected.shape[1] == prompt.shape[1] + NEW
    assert lm.continued(prompt, NEW).tolist() == expected.tolist()


def test_logits_of_every_step_agree_with_float64(lm: Any) -> None:
    """Of the prompt and of 64 tokens after it: real text, whatever the model would have said."""
    sequence = lm.long_prompt(100 + NEW)
    assert error(lm.logits(sequence, NEW), lm.exact_logits(sequence, NEW)) <= TOLERANCE


def test_a_prompt_of_4000_tokens(lm: Any) -> None:
    prompt = lm.long_prompt(4000)
    expected, logits = lm.own(prompt, 8)
    assert lm.continued(prompt, 8).tolist() == expected.tolist()
    assert error(lm.logits(expected, 8), logits) <= TOLERANCE


def test_rows_of_different_lengths_are_like_each_alone(lm: Any) -> None:
    rows = [lm.long_prompt(150)[0, :length] for length in (150, 1, 17, 64)]
    together = lm.continued(rows, 24)[:, 150:]
    for row, found in zip(rows, together, strict=True):
        expected, _ = lm.own(row[None], 24)
        assert found.tolist() == expected[0, len(row) :].tolist()
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    logits = lm.compiled(ids, lm.compiled.new_cache(4, 150), torch.tensor([150, 1, 17, 64]))
    alone = [lm.compiled(row[None], lm.compiled.new_cache(1, 150)) for row in rows]
    assert error(logits, torch.cat(alone)) <= TOLERANCE


def test_transformers_generates_with_the_compiled_model(lm: Any) -> None:
    texts = lm.tokenizer
    texts.pad_token = texts.eos_token
    batch = texts(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    adapted = lm.compiled.as_transformers()
    found = adapted.generate(**batch, max_new_tokens=24, do_sample=False, eos_token_id=None)
    for text, row in zip(PROMPTS, found, strict=True):
        expected, _ = lm.own(lm.prompt(text), 24)
        assert row[-24:].tolist() == expected[0, -24:].tolist()


def test_both_programs_are_compiled_whole(lm: Any) -> None:
    assert lm.compiled.report.fallbacks == ()
    for name in ("prefill", "decode"):
        kinds = [region.kind for region in lm.compiled.compiled.entry(name).plan.regions]
        assert kinds == ["compiled"]


def test_layers_are_sparse_where_zeros_pay(lm: Any) -> None:
    final = {d.site: d for d in lm.compiled.report.final() if d.operator == "linear"}
    layers = [d for site, d in final.items() if ".layers." in site]
    assert len(layers) == 30 * 4
    assert {d.verdict for d in layers} == {"sparse" if is_pruned(lm) else "dense"}
    assert final["lm_head"].verdict == "dense"


def test_weights_are_in_memory_once(lm: Any) -> None:
    """Dense, all in one layout, the tied embedding too; pruned, two layouts are still less."""
    assert lm.compiled.nbytes <= lm.dense_bytes * (1 if is_pruned(lm) else 1.05)


def test_a_fresh_process_generates_the_same(lm: Any, tmp_path: Path) -> None:
    path = tmp_path / "smollm2.sparsify"
    lm.compiled.save(path)
    overhead = 8 << 20  # graphs and kernels
    assert path.stat().st_size <= lm.compiled.nbytes + overhead
    prompt = lm.prompt(PROMPTS[0])
    code = """
import sys, sparsify
compiled = sparsify.load(sys.argv[1], num_threads=1)
prompt = [[int(token) for token in sys.argv[2].split()]]
print("transformers" in sys.modules, *compiled.generate(prompt, max_new_tokens=64)[0].tolist())
"""
    ids = " ".join(map(str, prompt[0].tolist()))
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), ids], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    expected = lm.compiled.generate(prompt, max_new_tokens=NEW)[0].tolist()
    assert done.stdout.split() == ["False", *map(str, expected)]
