"""Sparse and dense linear kernels against dense peers, weight by weight.

    python -m benchmarks.spmm
    python -m benchmarks.spmm --shapes 768x768 --sparsity 80 90 --tokens 128 --threads 1
    python -m benchmarks.spmm --shapes --dlmc dlmc-subset.tar.xz

One cell is ``y[tokens, out] = x[tokens, in] @ W.T`` for one weight and thread count. Each weight
has the layout that the compiler would choose, dense being one. A kernel is timed as it runs inside
a compiled region, its activations in lanes, and between the conversions from and to row-major.
Weights of one shape take turns in one process with OpenVINO, ONNX Runtime and torch, which hold the
first of them as a dense constant. Speed-ups are the fastest peer's time over ours, above 1 when we
are faster, with their 95% interval over the rounds. GFLOP/s count the zeros. The error is the
largest against float64, over the output's largest value.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks import dlmc
from benchmarks.cells import (
    TOLERANCE,
    Cell,
    completed,
    interval,
    parser,
    publish,
    thread_counts,
    worst,
)
from benchmarks.linears import Kernels, Weight, random_weight
from sparsify.bench import (
    fastest,
    interleave,
    matmul_peers,
    ratio,
    relative_error,
    threads,
)

SHAPES = ("768x768", "3072x768", "768x3072", "384x384", "1536x384")
SPARSITIES = (0, 30, 50, 60, 70, 80, 90, 95)
TOKENS = (16, 32, 128, 512)
QUICK = {"shapes": SHAPES[3:], "sparsity": (0, 50, 90), "tokens": (16, 128), "rounds": 5}
SUMMARY = 128
"""Tokens of the cells that the means are over."""


def dlmc_weights(path: Path) -> Iterator[Weight]:
    """The collection's patterns, with random values (seeded)."""
    for pattern in dlmc.read(path):
        generator = torch.Generator().manual_seed(pattern.mask.numel())
        matrix = torch.randn(pattern.mask.shape, generator=generator) * pattern.mask
        layer = pattern.layer.removeprefix("body_").removesuffix("_fully_connected")
        layer = layer.replace("self_attention_multihead_attention", "attention")
        label = f"{float(pattern.sparsity):.0%} {layer}"
        yield Weight(pattern.model, label, matrix)


def measure(
    kernels: Kernels, weights: Sequence[Weight], tokens: int, given: argparse.Namespace, count: int
) -> Iterator[Cell]:
    """The cells of weights of one shape, all timed in turns with the same peers."""
    from sparsify.codegen.runtime import pool

    shape = out, features = weights[0].shape
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(tokens))
    candidates: dict[str, Callable[[], Any]] = {}
    cells = []
    with threads(count), pool.use_threads(count):
        for i, weight in enumerate(weights):
            layout = kernels.layout(weight, tokens, count)
            calls = kernels.calls(weight, x, layout)
            calls.row_major()
            reference = x.double() @ weight.matrix.double().t()
            _, error = relative_error(calls.y, reference)
            candidates[f"lanes {i}"] = calls.in_lanes
            candidates[f"rows {i}"] = calls.row_major
            cells.append((i, weight, layout, error))
        peers = matmul_peers(weights[0].matrix, x, count, tuple(given.against))
        first = x.double() @ weights[0].matrix.double().t()
        for peer in peers.values():
            peer.check((first,), TOLERANCE)
        samples = interleave({**candidates, **peers}, given.rounds, given.seconds)
    best = fastest(samples, peers)
    for i, weight, layout, error in cells:
        ours = {"lanes": samples[f"lanes {i}"], "rows": samples[f"rows {i}"]}
        yield {
            "origin": weight.origin,
            "weight": weight.label,
            "shape": list(shape),
            "sparsity": weight.sparsity,
            "tokens": tokens,
            "threads": count,
            "layout": layout.spec,
            "us": {name: s.median * 1e6 for name, s in ours.items()},
            "peers_us": {name: samples[name].median * 1e6 for name in peers},
            "best_peer": best,
            "gflops": 2e-9 * out * features * tokens / ours["lanes"].median,
            "speedup": {
                name: ratio(s, samples[best]).inverse.to_dict() for name, s in ours.items()
            },
            "max_rel_error": error,
        }


def groups(given: argparse.Namespace) -> list[list[Weight]]:
    """Weights by shape."""
    weights = [random_weight(shape, s) for shape in given.shapes for s in given.sparsity]
    collected = [list(group) for _, group in groupby(weights, lambda weight: weight.shape)]
    if given.dlmc is not None:
        patterns = sorted(dlmc_weights(given.dlmc), key=lambda weight: weight.shape)
        collected += [list(group) for _, group in groupby(patterns, lambda weight: weight.shape)]
    return collected


def table(cells: Sequence[Cell]) -> Table:
    """What was measured together."""
    cell = cells[0]
    peers = ", ".join(f"{name} {us:.1f} us" for name, us in cell["peers_us"].items())
    plural = "" if cell["threads"] == 1 else "s"
    made = Table(
        title=f"{'x'.join(map(str, cell['shape']))}, {cell['tokens']} tokens, "
        f"{cell['threads']} thread{plural}; dense: {peers}",
        title_justify="left",
    )
    made.add_column("weight", overflow="fold")
    made.add_column("layout", no_wrap=True)
    for name in ("lanes us", "GFLOP/s", "x dense", "rows us", "x dense", "error"):
        made.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        made.add_row(
            cell["weight"],
            re.sub(r"\w+=", "", cell["layout"]).replace("{", " ").rstrip("}"),
            f"{cell['us']['lanes']:.1f}",
            f"{cell['gflops']:.0f}",
            interval(cell["speedup"]["lanes"]),
            f"{cell['us']['rows']:.1f}",
            interval(cell["speedup"]["rows"]),
            f"{cell['max_rel_error']:.0e}",
        )
    return made


def means(cells: Sequence[Cell], tokens: int) -> Table:
    """Geometric means over the shapes or layers of one sparsity."""

    def key(cell: Cell) -> tuple[str, int, int]:
        return cell["origin"], cell["threads"], cell["sparsity"]

    made = Table(
        title=f"Geometric means of the speed-up over dense at {tokens} tokens",
        title_justify="left",
    )
    for name in ("weights", "threads", "sparsity", "cells", "lanes", "rows"):
        made.add_column(name, justify="left" if name == "weights" else "right")
    chosen = sorted((cell for cell in cells if cell["tokens"] == tokens), key=key)
    for (origin, count, sparsity), group in groupby(chosen, key):
        members = list(group)
        found = [
            statistics.geometric_mean(cell["speedup"][name]["median"] for cell in members)
            for name in ("lanes", "rows")
        ]
        given = (count, f"{sparsity}%", len(members), *(f"{mean:.2f}" for mean in found))
        made.add_row(origin, *map(str, given))
    return made


def summary(cells: Sequence[Cell]) -> Iterator[Any]:
    if any(cell["tokens"] == SUMMARY for cell in cells):
        yield means(cells, SUMMARY)
    yield from worst(cells, lambda cell: cell["speedup"]["lanes"], lambda cell: cell["weight"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__, seconds=0.015)
    options.add_argument("--shapes", nargs="*", help="OUTxIN; nothing for DLMC alone")
    options.add_argument("--dlmc", type=Path, help="folder or archive of DLMC patterns")
    full = {"shapes": SHAPES, "sparsity": SPARSITIES, "tokens": TOKENS, "rounds": 12}
    return completed(options.parse_args(arguments), full, QUICK)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when an error exceeds what we promise."""
    given = parse(arguments)
    collected = groups(given)
    kernels = Kernels([w for group in collected for w in group], given.tokens, given.threads)
    measured = (
        list(measure(kernels, group, tokens, given, count))
        for count, group, tokens in product(thread_counts(given), collected, given.tokens)
    )
    return publish("fp32 linear", given, measured, table, summary)


if __name__ == "__main__":
    sys.exit(main())
