"""``sparsify explain``: every decision about one site."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sparsify.cli import options
from sparsify.cli.compile import compile_loaded
from sparsify.cli.console import command, show, show_json, step
from sparsify.cli.models import load_to_compile, quiet
from sparsify.cli.onnx import OnnxOptions
from sparsify.report import Decision, Report


@command
def explain(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="As for compile, or a compiled .sparsify file.",
            show_default=False,
        ),
    ],
    node: Annotated[
        str,
        typer.Argument(
            metavar="NODE",
            help="Name of a site, as the report prints it; a glob may match several.",
            show_default=False,
        ),
    ],
    target: options.Target = "native",
    threads: options.Threads = None,
    batch: options.Batch = None,
    seq: options.Seq = None,
    shape: options.Shape = None,
    constant: options.Constant = None,
    as_json: options.Json = False,
) -> None:
    """Tell every decision that was made about NODE of MODEL, and why."""
    decisions = about(
        _report(model, target, threads, batch, seq, OnnxOptions.of(shape, constant)), node
    )
    if as_json:
        show_json({"node": node, "decisions": [decision.to_dict() for decision in decisions]})
        return
    for site in dict.fromkeys(decision.site for decision in decisions):
        table = Table(title=site, title_justify="left")
        for column in ("pass", "verdict", "reason", "layout", "bytes", "predicted"):
            table.add_column(column, overflow="fold")
        for d in decisions:
            if d.site == site:
                stored = "" if d.bytes_stored is None else f"{d.bytes_stored:,}"
                seconds = d.predicted_seconds
                predicted = "" if seconds is None else f"{seconds * 1e6:.0f} us"
                layout = d.layout or ""
                table.add_row(d.made_by, d.verdict, d.reason, layout, stored, predicted)
        show(table)


def about(report: Report, node: str) -> tuple[Decision, ...]:
    """Decisions whose site is ``node``, matches it as a glob, or has it merged into itself.

    Raises:
        ValueError: there is no such site; the message names similar ones.
    """
    from sparsify.passes.sites import member_names

    names = {d.site: (d.site, *member_names(d.site)) for d in report}
    chosen = {
        site
        for site, known in names.items()
        if any(name == node or fnmatchcase(name, node) for name in known)
    }
    if not chosen:
        everything = sorted({name for known in names.values() for name in known})
        close = difflib.get_close_matches(node, everything, n=3, cutoff=0.3)
        close += [name for name in everything if node in name and name not in close][:3]
        hint = f"; similar: {', '.join(close)}" if close else ""
        raise ValueError(f"no decision was made about a site {node!r}{hint}")
    return tuple(d for d in report if d.site in chosen)


def _report(
    model: str,
    target: str,
    threads: int | None,
    batch: int | None,
    seq: int | None,
    onnx: OnnxOptions,
) -> Report:
    if Path(model).suffix == ".sparsify":
        import sparsify

        with step(f"loading {model}"), quiet():
            return sparsify.load(model).report
    with step(f"loading {model}"):
        loaded = load_to_compile(model, batch, seq, onnx)
    return compile_loaded(loaded, target=target, num_threads=threads).report
