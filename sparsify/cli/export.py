"""``sparsify export``: writes a model in a form that other programs run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify.cli import options
from sparsify.cli.compile import compile_loaded
from sparsify.cli.console import command, note, show, show_json, step
from sparsify.cli.models import load_to_compile, quiet


@command
def export(
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The file or folder to write.", show_default=False),
    ],
    onnx: Annotated[
        bool, typer.Option("--onnx", help="An ONNX file, which any ONNX Runtime runs.")
    ] = False,
    as_c: Annotated[
        bool,
        typer.Option("--c", help="A folder of C that needs neither Python nor TVM."),
    ] = False,
    standard: Annotated[
        bool,
        typer.Option("--standard", help="With --onnx: standard operators only, and dense weights."),
    ] = False,
    entry: Annotated[
        str | None,
        typer.Option(help="With --onnx: which entry of a language model.", show_default="prefill"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="With --c: what to compile for; see 'sparsify targets'.", show_default="native"
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="With --c: begins names of files and functions.", show_default="model"),
    ] = None,
    largest: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=SHAPE",
            help="With --c: the largest shape of an input, as x=1x128; may be repeated.",
            show_default="of the example inputs",
        ),
    ] = None,
    batch: options.Batch = None,
    seq: options.Seq = None,
    as_json: options.Json = False,
) -> None:
    """Write MODEL, which may be a compiled .sparsify file, as an ONNX file or a folder of C."""
    if onnx == as_c:
        raise ValueError("say what to write: --onnx or --c")
    of_c = {"--target": target, "--name": name, "--largest": largest}
    of_onnx = {"--standard": standard, "--entry": entry, "--json": as_json}
    for option, value in (of_onnx if as_c else of_c).items():
        if value:
            raise ValueError(f"{option} applies to {'--onnx' if as_c else '--c'} only")
    if as_c:
        _write_c(model, output, target, name or "model", largest or (), batch, seq)
        return
    compiled = _compiled(model, batch, seq)
    with step(f"writing {output}"), quiet():
        chosen = {} if entry is None else {"entry": entry}
        summary = compiled.export_onnx(output, standard=standard, **chosen)
    if as_json:
        show_json({"model": model, "output": str(output), **summary.to_dict()})
    else:
        show(f"{output}: {summary}")


def _write_c(
    model: str,
    output: Path,
    target: str | None,
    name: str,
    largest: Iterable[str],
    batch: int | None,
    seq: int | None,
) -> None:
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output}: is a file; name a folder to write into")
    shapes = dict(map(_shape, largest))
    compiled = _compiled(model, batch, seq)
    if not hasattr(compiled, "export_c"):
        raise ValueError(
            f"{model} is a language model, whose cache exported C cannot hold; export a module "
            "that takes all tokens at once, by module:factory"
        )
    with step(f"writing {output}"), quiet():
        compiled.export_c(output, target=target, name=name, largest=shapes)
    note(f"build it: cmake -S {output} -B {output}/build && cmake --build {output}/build")


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.partition("=")
    if not re.fullmatch(r"\d+(x\d+)*", sizes):
        raise ValueError(f"--largest {text!r}: write it as INPUT=SHAPE, such as x=1x128")
    return name, tuple(map(int, sizes.split("x")))


def _compiled(model: str, batch: int | None, seq: int | None) -> Any:
    """The model from its file, or compiled."""
    if Path(model).suffix != ".sparsify":
        with step(f"loading {model}"):
            loaded = load_to_compile(model, batch, seq)
        return compile_loaded(loaded)
    import sparsify

    for option, size in (("--batch", batch), ("--seq", seq)):
        if size is not None:
            raise ValueError(f"{model}: {option} does not apply to a compiled model")
    with step(f"loading {model}"):
        return sparsify.load(model)
