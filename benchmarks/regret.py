"""What prediction costs: the predicted layout's time over the best measured one's.

    python -m benchmarks.regret
    python -m benchmarks.regret --shapes 768x768 --sparsity 80 90 --tokens 1 128 --threads 1

One cell is ``y[tokens, out] = x[tokens, in] @ W.T`` for one random weight. Every layout that the
target has kernels for is timed twice, all in turns: the first series says which is best, the
second what choosing the predicted one instead costs, so that a lucky time wins nothing. Up to 8
tokens, weights come from memory, as they do in a model, or with ``--resident`` from a cache, as in
a small one; above, they may be cached.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cells import WIDTH
from benchmarks.linears import Weight, random_weight
from sparsify.bench import Machine, threads
from sparsify.layouts import Layout, form_of

SHAPES = ("768x768", "3072x768", "768x3072", "384x384", "1536x384")
SPARSITIES = (0, 30, 50, 60, 70, 80, 90, 95)
TOKENS, THREADS = (1, 2, 4, 8, 16, 32, 128, 512), (1, 2)


def measure(weights: Sequence[Weight], given: argparse.Namespace, count: int) -> list[Any]:
    """Two models that timed the same layouts of weights of one shape."""
    from sparsify.codegen.cost import CpuCostModel
    from sparsify.codegen.measurements import Measurements
    from sparsify.codegen.target import Target
    from sparsify.codegen.tune import Effort, TunedCostModel

    predicted = CpuCostModel(Target.parse("native"), count, given.resident)
    every = Effort(1000, given.rounds, given.seconds)
    models = [TunedCostModel(predicted, every, Measurements(None)) for _ in range(2)]
    with threads(count):
        for model in models:
            # Each token count alone: a layout for few tokens is no candidate at many.
            model.measure([(w.matrix, [n]) for w in weights for n in given.tokens])
    return models


def cells(shape: str, given: argparse.Namespace, count: int) -> Iterator[dict[str, Any]]:
    weights = [random_weight(shape, sparsity) for sparsity in given.sparsity]
    models = measure(weights, given, count)
    for weight in weights:
        for n in given.tokens:
            yield cell(weight, n, count, *models)


def cell(weight: Weight, tokens: int, count: int, first: Any, second: Any) -> dict[str, Any]:
    shape, nnz = weight.shape, weight.nnz
    predicted = first.predicted

    def seconds(model: Any, layout: Layout) -> float:
        return float(model.linear_seconds(layout, shape, nnz, tokens))

    layouts = first.candidates(shape, nnz, tokens)
    chosen = min(layouts, key=lambda layout: seconds(predicted, layout))
    best = min(layouts, key=lambda layout: seconds(first, layout))
    return {
        "shape": list(shape),
        "sparsity": weight.sparsity,
        "tokens": tokens,
        "threads": count,
        "predicted": chosen.spec,
        "best": best.spec,
        "regret": seconds(second, chosen) / seconds(second, best),
        "us": {layout.spec: 1e6 * seconds(second, layout) for layout in layouts},
        "predicted_us": {layout.spec: 1e6 * seconds(predicted, layout) for layout in layouts},
    }


def table(found: Sequence[dict[str, Any]]) -> Table:
    """Geometric means for few tokens and for many."""

    def key(cell: dict[str, Any]) -> tuple[int, str]:
        return cell["threads"], form_of(cell["tokens"])

    made = Table(title="Regret of prediction against measurement", title_justify="left")
    for name in ("threads", "activations", "cells", "geometric mean", "90th percentile", "worst"):
        made.add_column(name, justify="right")
    for (count, form), group in groupby(sorted(found, key=key), key):
        regrets = sorted(cell["regret"] for cell in group)
        mean = statistics.geometric_mean(regrets)
        figures = (mean, regrets[int(0.9 * (len(regrets) - 1))], regrets[-1])
        made.add_row(str(count), form, str(len(regrets)), *(f"{value:.3f}" for value in figures))
    return made


def worst(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    for cell in sorted(found, key=lambda cell: -cell["regret"])[:8]:
        yield (
            f"  {cell['regret']:.2f}  {'x'.join(map(str, cell['shape']))} {cell['sparsity']}%, "
            f"{cell['tokens']} tokens, threads {cell['threads']}: {cell['predicted']}, "
            f"not {cell['best']}"
        )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="OUTxIN")
    parser.add_argument("--sparsity", type=int, nargs="+", default=SPARSITIES, help="percent")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--resident", action="store_true", help="weights stay in a cache")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.005, help="length of one turn")
    parser.add_argument("--json", action="store_true", help="one record a line, no tables")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    width = None if sys.stdout.isatty() else WIDTH
    console = Console(quiet=given.json, highlight=False, width=width)
    console.print(f"fp32 linear, {Machine.here().line(max(given.threads))}")
    found: list[dict[str, Any]] = []
    for count in sorted(given.threads, reverse=True):
        for shape in given.shapes:
            for record in cells(shape, given, count):
                found.append(record)
                if given.json:
                    print(json.dumps(record), flush=True)
    console.print(table(found))
    console.print("Worst:", *worst(found), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
