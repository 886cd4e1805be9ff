"""``sparsify build-ort-ops``: compiles the custom-operator library for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import options
from sparsify.cli.console import command, show, show_json, step


@command
def build_ort_ops(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The shared library to write."),
    ] = Path("libsparsify_ort.so"),
    target: options.Target = "native",
    as_json: options.Json = False,
) -> None:
    """Compile our operators as a library for ONNX Runtime 1.17 and later."""
    from sparsify import onnxruntime

    with step(f"compiling {output}"):
        onnxruntime.build_library(output, target=target)
    if as_json:
        show_json({"output": str(output), "target": target, "bytes": output.stat().st_size})
    else:
        show(f"{output}: {output.stat().st_size / 1e3:.0f} kB for {target}")
