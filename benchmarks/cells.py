"""What benchmarks of single linears share: their options, what they print and write, the verdict.

A cell is one record: a weight at one token and thread count, with its speed-up over dense.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsify.bench import MATMUL_PEERS, Machine
from sparsify.bench.harness import Ratio

Cell = dict[str, Any]

TOLERANCE = 1e-5
"""Largest relative error that we promise."""
SLOWER = 0.97
"""A cell whose whole interval lies below counts as slower than dense."""
THREADS = (1, 2)
WIDTH = 140
"""Columns of the tables in a file."""
_WORST = 5


def parser(description: str | None, seconds: float) -> argparse.ArgumentParser:
    """The options that all have; ``description`` is the benchmark's docstring."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--sparsity", type=int, nargs="+", help="percent")
    made.add_argument("--tokens", type=int, nargs="+")
    made.add_argument("--threads", type=int, nargs="+", default=THREADS)
    made.add_argument("--against", nargs="+", default=tuple(MATMUL_PEERS))
    made.add_argument("--rounds", type=int)
    made.add_argument("--seconds", type=float, default=seconds, help="length of one turn")
    made.add_argument("--quick", action="store_true", help="few cells and rounds")
    made.add_argument("--json", action="store_true", help="one record a line, no tables")
    made.add_argument("--output", type=Path, help="also write the records to this file")
    return made


def completed(
    given: argparse.Namespace, full: Mapping[str, Any], quick: Mapping[str, Any]
) -> argparse.Namespace:
    """What was not given as in a full run, or as in a quick one."""
    for name, value in (quick if given.quick else full).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given


def thread_counts(given: argparse.Namespace) -> list[int]:
    """The most first: threads that a peer starts keep to the processors of that moment."""
    return sorted(given.threads, reverse=True)


def publish(
    title: str,
    given: argparse.Namespace,
    groups: Iterable[Sequence[Cell]],
    table: Callable[[Sequence[Cell]], Table],
    summary: Callable[[Sequence[Cell]], Iterable[Any]],
) -> int:
    """Prints and writes groups of cells as they are measured, and the summary of all.

    Returns:
        The exit code: 1 when an error exceeds what we promise.
    """
    width = None if sys.stdout.isatty() else WIDTH
    console = Console(quiet=given.json, highlight=False, width=width)
    machine = Machine.here()
    console.print(f"{title}, {machine.line(max(given.threads))}")
    cells: list[Cell] = []
    with contextlib.ExitStack() as stack:
        files = [sys.stdout] if given.json else []
        if given.output is not None:
            files.append(stack.enter_context(given.output.open("w")))
        for found in groups:
            cells += found
            console.print(table(found))
            for cell in found:
                record = json.dumps({**cell, "machine": machine.to_dict()}, sort_keys=True)
                for file in files:
                    print(record, file=file, flush=True)
    for item in summary(cells):
        console.print(item)
    return verdict(sum(not cell["max_rel_error"] <= TOLERANCE for cell in cells), TOLERANCE)


def print_lines(
    title: str,
    given: argparse.Namespace,
    cells: Iterable[Cell],
    line: Callable[[Cell], str],
    tolerance: float = TOLERANCE,
) -> int:
    """Prints cells one a line as they are measured; with ``--json`` their records.

    Returns:
        The exit code: 1 when an error exceeds what we promise.
    """
    machine = Machine.here()
    if not given.json:
        print(f"{title}, {machine.line(max(given.threads))}", flush=True)
    wrong = 0
    for cell in cells:
        wrong += not cell["max_rel_error"] <= tolerance
        record = {**cell, "machine": machine.to_dict()}
        print(json.dumps(record, sort_keys=True) if given.json else line(cell), flush=True)
    return verdict(wrong, tolerance)


def times_and_ratios(cell: Cell) -> str:
    """Milliseconds of all candidates, and our time over each other's."""
    times = "  ".join(f"{name} {ms:.2f}" for name, ms in cell["ms"].items())
    ratios = "  ".join(f"/{name} {Ratio(**found)}" for name, found in cell["ratio"].items())
    return f"ms: {times}   {ratios}"


def verdict(wrong: int, tolerance: float) -> int:
    """The exit code when so many cells exceed the error that we promise; says so on stderr."""
    if wrong:
        print(f"{wrong} cells exceed an error of {tolerance:.0e}", file=sys.stderr)
    return 1 if wrong else 0


def interval(speedup: Mapping[str, float]) -> str:
    return f"{speedup['median']:.2f} [{speedup['low']:.2f}, {speedup['high']:.2f}]"


def worst(
    cells: Sequence[Cell],
    speedup: Callable[[Cell], Mapping[str, float]],
    name: Callable[[Cell], str],
) -> Iterator[str]:
    """The cells that are slower than dense, or least faster."""
    slower = sum(speedup(cell)["high"] < SLOWER for cell in cells)
    yield f"{slower} of {len(cells)} cells are slower than dense (interval below {SLOWER}). Worst:"
    for cell in sorted(cells, key=lambda cell: speedup(cell)["median"])[:_WORST]:
        shape = "x".join(map(str, cell["shape"]))
        yield (
            f"  {interval(speedup(cell))}  {shape} {name(cell)}, {cell['tokens']} tokens, threads "
            f"{cell['threads']}: {cell['layout']} against {cell['best_peer']}"
        )
