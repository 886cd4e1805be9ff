"""MODEL on the command line: .pt2 or .onnx file, Hugging Face folder, or ``module:factory``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.export import ExportedProgram

from sparsify.bench.models import load_exported
from sparsify.cli.console import note
from sparsify.cli.huggingface import load_folder
from sparsify.cli.onnx import OnnxOptions
from sparsify.frontend.causal_lm import is_causal_lm
from sparsify.report import Notice


@dataclass(frozen=True)
class LoadedModel:
    """A model and inputs to call it with: a tuple of arguments or ``(args, kwargs)``."""

    name: str
    kind: Literal["pt2", "onnx", "huggingface", "factory"]
    model: torch.nn.Module | ExportedProgram
    inputs: Any

    @property
    def module(self) -> torch.nn.Module:
        """The model as something that eager PyTorch can call."""
        return self.model.module() if isinstance(self.model, ExportedProgram) else self.model

    @property
    def generates(self) -> bool:
        """Whether it is a language model that is compiled to generate text.

        One from a factory is, unless it came with example inputs, as for `sparsify.compile`.
        """
        return is_causal_lm(self.model) and (self.kind == "huggingface" or self.inputs is None)


def load_model(
    text: str,
    batch: int | None = None,
    seq: int | None = None,
    onnx: OnnxOptions | None = None,
) -> LoadedModel:
    """Loads what ``text`` names, in evaluation mode.

    Args:
        batch, seq: sizes of the example inputs, where we are the ones who make them.
        onnx: shapes and constants of inputs of an ONNX file.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is not a model we can read; the message says what is accepted.
    """
    for name, size in (("--batch", batch), ("--seq", seq)):
        if size is not None and size < 1:
            raise ValueError(f"{name} {size} must be at least 1")
    path = Path(text)
    if path.suffix == ".onnx" and not path.is_dir():
        with quiet():
            exported = (onnx or OnnxOptions()).load(text, batch, seq)
        return LoadedModel(text, "onnx", exported, exported.example_inputs)
    if onnx:
        raise ValueError(f"{text}: --shape and --constant are for ONNX files")
    if path.is_dir():
        with quiet():
            model, inputs = load_folder(path, batch or 1, seq)
        return LoadedModel(text, "huggingface", model, inputs)
    if path.suffix == ".pt2":
        return _load_pt2(path, batch, seq)
    if path.suffix == ".sparsify":
        raise ValueError(f"{text} is compiled already; pass the model that it was compiled from")
    if ":" in text:
        return _load_factory(text, batch, seq)
    if path.exists():
        raise ValueError(f"{text}: not a model we can read; {_ACCEPTED}")
    raise FileNotFoundError(f"{text}: no such file or folder; {_ACCEPTED}")


_ACCEPTED = "MODEL is a .pt2 or .onnx file, a Hugging Face folder, or module:factory"


def _load_pt2(path: Path, batch: int | None, seq: int | None) -> LoadedModel:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if batch is not None or seq is not None:
        raise ValueError(
            f"{path}: --batch and --seq do not apply to a .pt2 file, which carries its inputs"
        )
    try:
        with quiet():
            exported = load_exported(path)
    except Exception as error:
        raise ValueError(f"{path}: not a file of torch.export.save, or damaged: {error}") from error
    if exported.example_inputs is None:
        raise ValueError(f"{path}: holds no example inputs; export it again with them")
    return LoadedModel(str(path), "pt2", exported, exported.example_inputs)


def _load_factory(text: str, batch: int | None, seq: int | None) -> LoadedModel:
    where, _, name = text.rpartition(":")
    factory = getattr(_import(where), name, None)
    if not callable(factory):
        raise ValueError(f"{text}: {where} has no callable {name!r}")
    accepted = _parameters(factory)
    sizes = {key: size for key, size in (("batch", batch), ("seq", seq)) if size is not None}
    refused = [f"--{key}" for key in sizes if key not in accepted]
    if refused:
        raise ValueError(f"{text}: {name} takes no parameter for {' and '.join(refused)}")
    made = factory(**sizes)
    if not (isinstance(made, tuple) and len(made) == 2):
        made = (made, None)
    model, inputs = made
    if not isinstance(model, torch.nn.Module | ExportedProgram):
        raise ValueError(
            f"{text}: {name} returned {type(model).__name__}; it must return a torch.nn.Module, "
            "or a module and its example inputs"
        )
    if isinstance(model, ExportedProgram):
        inputs = inputs or model.example_inputs
    else:
        model = model.eval()
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    return LoadedModel(text, "factory", model, inputs)


def need_inputs(loaded: LoadedModel) -> LoadedModel:
    """Raises ValueError when a factory gave a model without example inputs."""
    if loaded.inputs is None:
        raise ValueError(
            f"{loaded.name}: gives no example inputs; let the factory return (model, inputs)"
        )
    return loaded


def load_to_compile(
    text: str, batch: int | None, seq: int | None, onnx: OnnxOptions | None = None
) -> LoadedModel:
    """`load_model` with what a compilation needs: example inputs, or a model that generates.

    Raises:
        ValueError: there are no inputs, or sizes are given for a model that takes them all.
    """
    loaded = load_model(text, batch, seq, onnx)
    if not loaded.generates:
        return need_inputs(loaded)
    if batch is not None or seq is not None:
        raise ValueError(
            f"{text}: --batch and --seq do not apply to a language model, which is compiled for "
            "batches and prompts of any size"
        )
    return loaded


def _import(where: str) -> Any:
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise FileNotFoundError(f"{where}: no such file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # so that its classes can be found by name
        spec.loader.exec_module(module)
        return module
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name and where.startswith(error.name):
            raise ValueError(f"{where}: no such module from {Path.cwd()}; {_ACCEPTED}") from error
        raise


def _parameters(factory: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return set()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries print warnings about their own insides, which no user can act on; ours are told."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", Notice)
            warnings.showwarning = lambda message, *_, **__: note(f"note: {message}")
            yield
    finally:
        logging.disable(previous)
