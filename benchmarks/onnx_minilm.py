"""MiniLM-L6 exported to ONNX, in ONNX Runtime, with our library and without: against a dense file.

    python -m benchmarks.onnx_minilm
    python -m benchmarks.onnx_minilm --sparsity 90 --batch 1 --seq 128 --threads 1

All sessions take turns in one process. ``stock`` is our file by its function bodies alone,
``library`` the same file with our kernels. They are compared with the file that PyTorch exports at
these fixed shapes (``dense``) and with our own export of standard operators, dynamic and dense
(``standard``). Ratios are over the faster of those two, below 1 when we are faster, with their 95%
interval over the rounds. The error is the largest of the library's outputs' against float64 eager
PyTorch, over the output's largest value.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import sparsify
from benchmarks.minilm import inputs, load
from sparsify import onnxruntime
from sparsify.bench import (
    Machine,
    OnnxModel,
    float64_reference,
    interleave,
    ratio,
    relative_error,
    threads,
)
from sparsify.bench.harness import Ratio
from sparsify.bench.runtimes import onnxruntime_peer

TOLERANCE = 2e-5
"""Largest relative error that we promise."""


def cells(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    library = onnxruntime.library()
    for sparsity in given.sparsity:
        model = load(sparsity)
        with tempfile.TemporaryDirectory(prefix="onnx-minilm-") as folder:
            ours, standard = Path(folder, "sparse.onnx"), Path(folder, "standard.onnx")
            compiled = sparsify.compile(model, inputs(1, 128))
            compiled.export_onnx(ours)
            compiled.export_onnx(standard, standard=True)
            for batch in given.batch:
                for seq in given.seq:
                    feeds = inputs(batch, seq)
                    reference = float64_reference(model, feeds)
                    dense = OnnxModel.export(model, feeds)
                    for count in given.threads:
                        files = {
                            "dense": onnxruntime_peer(dense.path, dense.feeds, count),
                            "standard": onnxruntime_peer(standard, feeds, count),
                            "stock": onnxruntime_peer(ours, feeds, count),
                            "library": onnxruntime_peer(ours, feeds, count, library),
                        }
                        shape = {"sparsity": sparsity, "batch": batch, "seq": seq}
                        yield {**shape, "threads": count, **measure(files, reference, count, given)}


def measure(
    files: dict[str, Any], reference: Any, count: int, given: argparse.Namespace
) -> dict[str, Any]:
    for peer in files.values():
        peer.check(reference, TOLERANCE)
    _, error = relative_error(files["library"].outputs(), reference)
    with threads(count):
        samples = interleave(files, given.rounds, given.seconds)
    best = min(("dense", "standard"), key=lambda name: samples[name].median)
    return {
        "ms": {name: sample.median * 1e3 for name, sample in samples.items()},
        "ratio": {n: ratio(samples[n], samples[best]).to_dict() for n in ("stock", "library")},
        "bytes": {name: peer.file_bytes for name, peer in files.items()},
        "max_rel_error": error,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sparsity", type=int, nargs="+", default=(80, 90), help="percent")
    parser.add_argument("--batch", type=int, nargs="+", default=(1,))
    parser.add_argument("--seq", type=int, nargs="+", default=(128,))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of one turn")
    parser.add_argument("--json", action="store_true", help="one record a line")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    machine = Machine.here()
    if not given.json:
        print(f"MiniLM-L6 in ONNX Runtime, fp32, {machine.line(max(given.threads))}", flush=True)
    for cell in cells(given):
        if given.json:
            print(json.dumps({**cell, "machine": machine.to_dict()}), flush=True)
            continue
        times = "  ".join(f"{name} {ms:.2f}" for name, ms in cell["ms"].items())
        ratios = "  ".join(f"{name} {Ratio(**found)}" for name, found in cell["ratio"].items())
        print(
            f"{cell['sparsity']:3d}%  {cell['batch']}x{cell['seq']:<3d}  threads {cell['threads']}"
            f"   ms: {times}   of dense: {ratios}   error {cell['max_rel_error']:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
