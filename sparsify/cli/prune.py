"""``sparsify prune``: zeros weights by magnitude and saves the model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.export import ExportedProgram

from sparsify.cli import options
from sparsify.cli.console import command, show, show_json, step
from sparsify.cli.models import LoadedModel, load_model, need_inputs, quiet
from sparsify.cli.onnx import OnnxOptions
from sparsify.pruning import Unstructured


@command
def prune(
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="A .pt2 file, or, for a Hugging Face model, a folder.",
            show_default=False,
        ),
    ],
    sparsity: Annotated[float, typer.Option(help="Fraction of zeros, 0 to 1.", show_default=False)],
    scope: Annotated[
        str, typer.Option(help="'layer': the fraction in each; 'global': over all layers.")
    ] = "layer",
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Layers to leave alone; may be repeated."),
    ] = None,
    batch: options.Batch = None,
    seq: options.Seq = None,
    shape: options.Shape = None,
    constant: options.Constant = None,
    as_json: options.Json = False,
) -> None:
    """Zero the smallest weights of MODEL and save it."""
    method = Unstructured(sparsity, scope, tuple(skip or ()))  # type: ignore[arg-type]
    with step(f"loading {model}"):
        loaded = load_model(model, batch, seq, OnnxOptions.of(shape, constant))
    _check_output(loaded, output)
    with step("pruning"):
        report = method.apply(loaded.model)
    with step(f"saving {output}"):
        _save(loaded, output)
    if as_json:
        show_json({"model": model, "output": str(output), **report.to_dict()})
    else:
        show(report)


def _check_output(loaded: LoadedModel, output: Path) -> None:
    """Before the work: what is asked for must be something we can write."""
    if output.suffix == ".pt2":
        need_inputs(loaded)
    elif loaded.kind != "huggingface":
        raise ValueError(f"{output}: a model from {loaded.name} is saved as a .pt2 file")
    elif output.exists() and output.resolve() == Path(loaded.name).resolve():
        raise ValueError(f"{output}: is the folder that the model came from; name another")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"{output.absolute().parent}: no such folder to save into")


def _save(loaded: LoadedModel, output: Path) -> None:
    if output.suffix == ".pt2":
        from sparsify.frontend.torch import capture

        exported = loaded.model
        if loaded.generates:  # a cache of keys and values is no output of an exported program
            exported.config.use_cache = False  # type: ignore[union-attr]
        with quiet():
            if not isinstance(exported, ExportedProgram):
                exported = capture(exported, loaded.inputs)
            torch.export.save(exported, output)
        return
    loaded.model.save_pretrained(output)  # type: ignore[operator, union-attr]
    for source in Path(loaded.name).iterdir():  # tokenizer and the rest of the folder
        extra = source.is_file() and source.suffix not in (".safetensors", ".bin")
        if extra and not (output / source.name).exists():
            shutil.copy2(source, output / source.name)
