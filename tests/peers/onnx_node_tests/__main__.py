"""Runs the onnx package's node tests: ``python -m tests.peers.onnx_node_tests --filter conv``."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from functools import partial
from typing import Annotated

import typer

from tests.peers.onnx_node_tests.cases import Case, all_cases, matching, sample
from tests.peers.onnx_node_tests.check import check
from tests.peers.onnx_node_tests.outcome import (
    Outcome,
    count_by_verdict,
    read_failing,
    write_failing,
)
from tests.peers.onnx_node_tests.pool import Pool


def main(
    filter: Annotated[str, typer.Option(help="Part of a case's name, or an operator.")] = "",
    jobs: Annotated[int, typer.Option(help="Cases at a time.")] = 1,
    seconds: Annotated[float, typer.Option(help="A case that computes longer has failed.")] = 30.0,
    only: Annotated[int, typer.Option(help="Run so many cases, the same each time.")] = 0,
    eager: Annotated[bool, typer.Option(help="Only import; PyTorch runs the program.")] = False,
    verbose: Annotated[bool, typer.Option(help="Print every case.")] = False,
    write: Annotated[bool, typer.Option(help="Write the list of those that fail.")] = False,
) -> None:
    """Each case: import, passes, TVM, run, and the package's own comparison."""
    cases = matching(filter) if filter else all_cases()
    if only:
        cases = sample(cases, only)
    started, outcomes = time.perf_counter(), {}
    for case, outcome in Pool(partial(check, eager=eager), jobs, seconds).run(cases):
        outcomes[case.name] = outcome
        if verbose or not outcome.passed:
            print(f"{case.name} {outcome}", flush=True)
    _print_summary(cases, outcomes, time.perf_counter() - started)
    failing = {name: outcome for name, outcome in outcomes.items() if not outcome.passed}
    if write:
        if filter or only or eager:
            raise typer.BadParameter("the list is of all cases, compiled: give no other option")
        write_failing(failing)
    elif new := sorted(failing.keys() - read_failing().keys()):
        print(f"fail, and are not on the list of those that do: {', '.join(new)}")
        sys.exit(1)


def _print_summary(cases: tuple[Case, ...], outcomes: dict[str, Outcome], seconds: float) -> None:
    counts = count_by_verdict(outcomes.values())
    passed = sum(outcome.passed for outcome in outcomes.values())
    print(f"{passed} of {len(outcomes)} pass, in {seconds:.0f} s:")
    print("  " + ", ".join(f"{verdict} {count}" for verdict, count in counts.items() if count))
    fixed = sum(bool(o.fixed) for o in outcomes.values() if o.passed)
    print(f"  {fixed} of those that pass with inputs made constants, for shapes follow from them")
    by_operator: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        if not outcomes[case.name].passed:
            by_operator[", ".join(case.operators[:3])].append(case.name)
    for operator, names in sorted(by_operator.items(), key=lambda item: -len(item[1])):
        print(f"  {len(names):4d} {operator}")


typer.run(main)
