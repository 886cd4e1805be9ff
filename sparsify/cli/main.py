"""The application: its commands and the options before them."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsify.cli.analyze import analyze
from sparsify.cli.benchmark import benchmark
from sparsify.cli.build_ort_ops import build_ort_ops
from sparsify.cli.compile import compile_model
from sparsify.cli.console import set_debug
from sparsify.cli.explain import explain
from sparsify.cli.export import export
from sparsify.cli.generate import generate
from sparsify.cli.listings import passes, targets
from sparsify.cli.optimize import optimize
from sparsify.cli.prune import prune

app = typer.Typer(
    name="sparsify",
    help="A compiler for sparse neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    set_debug(debug)


app.command("compile")(compile_model)
app.command("build-ort-ops")(build_ort_ops)
for _command in (analyze, benchmark, prune, export, optimize, generate, explain, targets, passes):
    app.command()(_command)
