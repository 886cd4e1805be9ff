"""``sparsify compile``: compiles a model, prints the report, saves the result."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify.cli import options
from sparsify.cli.console import command, note, show, show_json, step
from sparsify.cli.models import LoadedModel, load_to_compile, quiet
from sparsify.cli.onnx import OnnxOptions


@command
def compile_model(
    model: options.Model,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where to save the compiled model, a .sparsify file."),
    ] = None,
    target: options.Target = "native",
    threads: options.Threads = None,
    batch: options.Batch = None,
    seq: options.Seq = None,
    shape: options.Shape = None,
    constant: options.Constant = None,
    passes: Annotated[
        str | None,
        typer.Option(help="The pipeline, as 'fuse_attention,sparse_linear{max_density=0.7},...'."),
    ] = None,
    disable: Annotated[
        list[str] | None,
        typer.Option(metavar="PASS", help="Leave this pass out; may be repeated."),
    ] = None,
    print_before: Annotated[
        list[str] | None,
        typer.Option(metavar="PASS", help="Print the graph before this pass, or 'all'."),
    ] = None,
    print_after: Annotated[
        list[str] | None,
        typer.Option(metavar="PASS", help="Print the graph after this pass, or 'all'."),
    ] = None,
    verify: Annotated[
        str, typer.Option(help="After each pass: 'shapes', or 'numeric' to compare results too.")
    ] = "shapes",
    tune: options.Tune = "off",
    strict: Annotated[
        bool, typer.Option(help="Fail instead of leaving an operator to PyTorch.")
    ] = False,
    cache: options.Cache = True,
    as_json: options.Json = False,
) -> None:
    """Compile MODEL, print what was done at each site, and save the result."""
    observer = graph_printer(tuple(print_before or ()), tuple(print_after or ()))
    if output is not None:
        _check_output(output)
    with step(f"loading {model}"):
        loaded = load_to_compile(model, batch, seq, OnnxOptions.of(shape, constant))
    compiled = compile_loaded(
        loaded,
        target=target,
        num_threads=threads,
        passes=None if passes is None else _parsed(passes),
        disable=tuple(disable or ()),
        verify=verify,
        tune=tune,
        strict=strict,
        # A compilation from the cache runs no pass, so there would be nothing to print.
        cache=cache and observer is None,
        observer=observer,
    )
    if output is not None:
        with step(f"saving {output}"):
            compiled.save(output)
    if as_json:
        show_json(compiled.report.to_dict())
    else:
        show(compiled.report)


def compile_loaded(loaded: LoadedModel, **config: Any) -> Any:
    """``sparsify.compile`` with a sign of life (tuning shows its own).

    A language model is compiled to generate.
    """
    import sparsify

    inputs = None if loaded.generates else loaded.inputs
    tuned = config.get("tune", "off") != "off"
    sign = contextlib.nullcontext() if tuned else step(f"compiling {loaded.name}")
    with sign, quiet():
        return sparsify.compile(loaded.model, inputs, **config)


def graph_printer(before: tuple[str, ...], after: tuple[str, ...]) -> Any:
    """An observer that prints graphs to stderr, or None when nothing is asked for."""
    from sparsify.passes import pass_names

    for name in (*before, *after):
        if name not in ("all", *pass_names()):
            raise ValueError(f"unknown pass {name!r}; passes: {', '.join(pass_names())}")
    if not before and not after:
        return None

    def observe(pass_: Any, old: Any, new: Any) -> None:
        for word, names, programs in (("before", before, old), ("after", after, new)):
            if pass_.name in names or "all" in names:
                for program in programs:
                    note(f"--- {program.name} {word} {pass_.name}\n{program.graph}")

    return observe


def _parsed(text: str) -> Any:
    from sparsify.passes import parse_pipeline

    return parse_pipeline(text)


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise IsADirectoryError(f"{output}: is a folder; name a file to save to")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"{output.absolute().parent}: no such folder to save into")
