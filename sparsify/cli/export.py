"""``sparsify export``: writes a model for use without Python."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import options
from sparsify.cli.compile import compile_loaded
from sparsify.cli.console import command, note, step
from sparsify.cli.models import load_to_compile


@command
def export(
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="What to write: a folder.", show_default=False),
    ],
    as_c: Annotated[
        bool,
        typer.Option("--c", help="A folder of C: kernels, weights, a runtime and a program."),
    ] = False,
    target: options.Target = "native",
    name: Annotated[
        str, typer.Option(help="Begins the names of files and functions of the C.")
    ] = "model",
    batch: options.Batch = None,
    seq: options.Seq = None,
) -> None:
    """Write MODEL for another program or machine to run.

    Sizes that vary do so up to those of --batch and --seq, or of the example inputs.
    """
    if not as_c:
        raise ValueError("say what to write: --c")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output}: is a file; name a folder to write into")
    with step(f"loading {model}"):
        loaded = load_to_compile(model, batch, seq)
    if loaded.generates:
        raise ValueError(
            f"{model} is a language model, whose cache exported C cannot hold; export a module "
            "that takes all tokens at once, by module:factory"
        )
    compiled = compile_loaded(loaded)
    with step(f"exporting to {output} for {target}"):
        compiled.export_c(output, target=target, name=name)
    note(f"build it: cmake -S {output} -B {output}/build && cmake --build {output}/build")
