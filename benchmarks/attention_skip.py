"""What skipping low scores inside the attention kernel brings SmolLM2-135M, and what it costs.

    python -m benchmarks.attention_skip
    python -m benchmarks.attention_skip --thresholds 4 8 --length 2048

A prompt of ``--length`` tokens of editorials is read whole but for what `skip_below` skips: values
of blocks of ``--keys`` keys that all queries of a tile score lower by more than the threshold than
the best before. Times are those of the whole prefill, in turns; a ratio below 1 is faster than
dense, whose selection of all blocks the others bear besides. `skipped` is the share of pairs whose
values are not read, in the mean over all heads, by the narrowest tiles, which skip most. Perplexity
is that of the same text, read at once, eagerly.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

import sparsify
from benchmarks.attention_perplexity import measured
from benchmarks.checkpoints import SMOLLM2
from benchmarks.editorials import token_windows
from benchmarks.records import Record, table
from sparsify.bench import interleave, ratio, threads
from sparsify.bench.prefill import CompiledPrefill
from sparsify.calibration import Calibration
from sparsify.contracts import PassContext
from sparsify.frontend.causal_lm import import_causal_lm
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.selection_trust import block_trust

PART = "skip"


def records_of(given: argparse.Namespace, model: Any, text: torch.Tensor) -> Iterator[Record]:
    recipes: dict[str, Any] = {"dense": None}
    for threshold in given.thresholds:
        recipe = sparsify.PooledBlocks(1.0, keys=given.keys, skip_below=threshold)
        recipes[f"below {threshold:g}"] = recipe
    runs = {}
    for name, recipe in recipes.items():
        options = {} if recipe is None else {"recipe": recipe}
        runs[name] = CompiledPrefill(sparsify.compile(model, num_threads=given.threads, **options))
    calls = {name: lambda run=run: run(text[None]) for name, run in runs.items()}
    samples = interleave(calls, given.rounds, 0.0, warmup=1)
    programs = run_pipeline(import_causal_lm(model), PORTABLE).programs
    for name, recipe in recipes.items():
        share = 0.0
        found = programs["prefill"]
        if recipe is not None:
            found = recipe.run(programs, PassContext()).programs["prefill"]
            heads = tuple(block_trust(found, Calibration([text]), str).heads())
            share = sum(head.skipped for head in heads) / len(heads)
        of_dense = ratio(samples[name], samples["dense"])
        yield {
            "part": PART,
            "method": name,
            "seconds": samples[name].median,
            "of_dense": of_dense.median,
            "low": of_dense.low,
            "high": of_dense.high,
            "skipped": share,
            "perplexity": measured(found, text)["perplexity"],
        }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--thresholds", type=float, nargs="+", default=(4.0, 6.0, 8.0, 12.0))
    parser.add_argument("--length", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--keys", type=int, default=16, help="of a block that is skipped")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    text = token_windows(SMOLLM2.tokenizer(), given.length)[-1]
    with threads(given.threads), torch.no_grad():
        Console(width=120).print(table(list(records_of(given, SMOLLM2.load(), text))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
