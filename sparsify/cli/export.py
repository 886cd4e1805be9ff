"""``sparsify export``: writes a model in a form that other programs run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify.cli import options
from sparsify.cli.compile import compile_loaded
from sparsify.cli.console import command, show, show_json, step
from sparsify.cli.models import load_to_compile, quiet


@command
def export(
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The file to write.", show_default=False),
    ],
    onnx: Annotated[
        bool, typer.Option("--onnx", help="An ONNX file, which any ONNX Runtime runs.")
    ] = False,
    standard: Annotated[
        bool,
        typer.Option("--standard", help="With --onnx: standard operators only, and dense weights."),
    ] = False,
    entry: Annotated[
        str | None,
        typer.Option(help="With --onnx: which entry of a language model.", show_default="prefill"),
    ] = None,
    batch: options.Batch = None,
    seq: options.Seq = None,
    as_json: options.Json = False,
) -> None:
    """Write MODEL, which may be a compiled .sparsify file, as an ONNX file."""
    if not onnx:
        raise ValueError("say what to write: --onnx")
    compiled = _compiled(model, batch, seq)
    with step(f"writing {output}"), quiet():
        chosen = {} if entry is None else {"entry": entry}
        summary = compiled.export_onnx(output, standard=standard, **chosen)
    if as_json:
        show_json({"model": model, "output": str(output), **summary.to_dict()})
    else:
        show(f"{output}: {summary}")


def _compiled(model: str, batch: int | None, seq: int | None) -> Any:
    """The model from its file, or compiled."""
    if Path(model).suffix != ".sparsify":
        with step(f"loading {model}"):
            loaded = load_to_compile(model, batch, seq)
        return compile_loaded(loaded)
    import sparsify

    for name, size in (("--batch", batch), ("--seq", seq)):
        if size is not None:
            raise ValueError(f"{model}: {name} does not apply to a model that is compiled already")
    with step(f"loading {model}"):
        return sparsify.load(model)
