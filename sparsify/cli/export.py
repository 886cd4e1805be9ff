"""``sparsify export``: writes a model in a form that other programs run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from sparsify.cli import options
from sparsify.cli.console import command, note, show, show_json, step
from sparsify.cli.models import quiet
from sparsify.cli.onnx import OnnxOptions
from sparsify.cli.source import Source


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
    standard: options.Standard = False,
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
    state: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=RESULT",
            help="With --c: an input that the program remembers from run to run, and the result "
            "that is its next value; may be repeated.",
        ),
    ] = None,
    initial: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=VALUE",
            help="With --c: the first value of an input of --state, a number or a .npy file; may "
            "be repeated.",
            show_default="zero",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --c, of a language model: tokens that its state holds.",
            show_default="all that the model takes",
        ),
    ] = None,
    batch: options.Batch = None,
    seq: options.Seq = None,
    shape: options.Shape = None,
    constant: options.Constant = None,
    as_json: options.Json = False,
) -> None:
    """Write MODEL, which may be a compiled .sparsify file, as an ONNX file or a folder of C."""
    if onnx == as_c:
        raise ValueError("say what to write: --onnx or --c")
    of_c: dict[str, Any] = {
        "--target": target,
        "--name": name,
        "--largest": largest,
        "--state": state,
        "--initial": initial,
        "--max-tokens": max_tokens,
    }
    of_onnx = {"--standard": standard, "--entry": entry, "--json": as_json}
    for option, value in (of_onnx if as_c else of_c).items():
        if value:
            raise ValueError(f"{option} applies to {'--onnx' if as_c else '--c'} only")
    source = Source(model, batch, seq, OnnxOptions.of(shape, constant))
    if as_c:
        of_model = {
            "largest": dict(map(_shape, largest or ())),
            "state": dict(map(_pair, state or ())),
            "initial": dict(map(_value, initial or ())),
        }
        _write_c(source, output, target, name or "model", of_model, max_tokens)
        return
    summary = _write_onnx(source, output, standard, entry)
    if as_json:
        show_json({"model": model, "output": str(output), **summary.to_dict()})
    else:
        show(f"{output}: {summary}")


def _write_onnx(source: Source, output: Path, standard: bool, entry: str | None) -> Any:
    """A compiled model shows its target's decisions; another needs no kernels to be written."""
    if source.is_compiled:
        compiled = source.compiled
        chosen = {} if entry is None else {"entry": entry}
        with step(f"writing {output}"), quiet():
            return compiled.export_onnx(output, standard=standard, **chosen)
    from sparsify.codegen.emit.onnx import export as write
    from sparsify.report import Report

    result = source.rewritten()
    names = result.programs.names
    entry = entry or names[0]
    if entry not in names:
        raise ValueError(f"the model has no entry {entry!r}, it has {', '.join(names)}")
    with step(f"writing {output}"), quiet():
        report, inputs = Report(result.decisions), source.input_names()
        return write(result.programs[entry], report, output, standard=standard, inputs=inputs)


def _write_c(
    source: Source,
    output: Path,
    target: str | None,
    name: str,
    of_model: Mapping[str, Any],
    max_tokens: int | None,
) -> None:
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output}: is a file; name a folder to write into")
    chosen = dict(of_model)
    if source.generates:
        if any(of_model.values()):
            raise ValueError(
                f"{source.text} is a language model, whose state is its cache; say --max-tokens "
                "instead of --largest, --state and --initial"
            )
        chosen = {"max_tokens": max_tokens}
    elif max_tokens is not None:
        raise ValueError(f"{source.text}: --max-tokens is for language models that generate")
    with step(f"writing {output}"), quiet():
        source.export_c(output, target=target, name=name, **chosen)
    note(f"build it: cmake -S {output} -B {output}/build && cmake --build {output}/build")


def _pair(text: str) -> tuple[str, str]:
    name, equals, result = text.rpartition("=")
    if not (name and equals and result):
        raise ValueError(f"--state {text!r}: write it as INPUT=RESULT, such as h=next_h")
    return name, result


def _value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"--initial {text!r}: write it as INPUT=VALUE, h=0.5 or h=first.npy")
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return name, number(value)
    return name, np.load(value)


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.partition("=")
    if not re.fullmatch(r"\d+(x\d+)*", sizes):
        raise ValueError(f"--largest {text!r}: write it as INPUT=SHAPE, such as x=1x128")
    return name, tuple(map(int, sizes.split("x")))
