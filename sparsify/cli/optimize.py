"""``sparsify optimize``: an ONNX file, rewritten by passes, as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import options
from sparsify.cli.console import command, show, show_json, step
from sparsify.cli.models import quiet
from sparsify.cli.onnx import OnnxOptions
from sparsify.cli.source import Source


@command
def optimize(
    model: Annotated[str, typer.Argument(metavar="IN.onnx", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The file to write.", show_default=False)
    ],
    passes: Annotated[
        str | None,
        typer.Option(
            help="The pipeline, as 'canonicalize,fuse_norm,...'; see 'sparsify passes'.",
            show_default="the portable passes",
        ),
    ] = None,
    disable: Annotated[
        list[str] | None,
        typer.Option(metavar="PASS", help="Leave this pass out; may be repeated."),
    ] = None,
    standard: options.Standard = False,
    verify: Annotated[
        str, typer.Option(help="After each pass: 'shapes', or 'numeric' to compare results too.")
    ] = "shapes",
    shape: options.Shape = None,
    constant: options.Constant = None,
    as_json: options.Json = False,
) -> None:
    """Rewrite an ONNX file by passes, for any ONNX Runtime."""
    from sparsify.codegen.emit.onnx import export
    from sparsify.passes import PORTABLE, SPECIALISE, parse_pipeline, without
    from sparsify.report import Report

    if Path(model).suffix != ".onnx":
        raise ValueError(f"{model}: is no .onnx file; other models go through 'sparsify export'")
    if verify not in ("shapes", "numeric"):
        raise ValueError(f"--verify {verify}: must be shapes or numeric")
    chosen = without(PORTABLE if passes is None else parse_pipeline(passes), disable or ())
    binding = tuple(type(pass_) for pass_ in SPECIALISE)
    bound = [pass_.name for pass_ in chosen if isinstance(pass_, binding)]
    if bound:
        raise ValueError(
            f"{', '.join(bound)}: binds a program to a target, and ONNX files have none; "
            "leave it out"
        )
    source = Source(model, onnx=OnnxOptions.of(shape, constant))
    result = source.rewritten(chosen, verify)
    (program,) = result.programs
    with step(f"writing {output}"), quiet():
        report, names = Report(result.decisions), source.input_names()
        summary = export(program, report, output, standard=standard, inputs=names)
    if as_json:
        show_json({"model": model, "output": str(output), **summary.to_dict()})
    else:
        show(f"{output}: {summary}")
