"""PyTorch models into programs: capture by torch.export, then the compiler's normal form.

    nn.Module | fx.GraphModule | ExportedProgram
      --capture--> ExportedProgram --normalise--> ProgramSet

The two stages are apart because a compile cache is keyed on what `capture` returns.
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from sparsify.frontend.checks import check_weights
from sparsify.frontend.examples import (
    Examples,
    misread,
    run_detached,
    serve_size_one,
    widenable,
)
from sparsify.frontend.mixtures import mixtures
from sparsify.frontend.normalise import normalise
from sparsify.frontend.ties import tie_indexed_sizes
from sparsify.program import ProgramSet

__all__ = ["capture", "import_torch", "normalise"]


def import_torch(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = "auto",
) -> ProgramSet:
    """One program named ``forward`` from a PyTorch model, in evaluation mode.

    Args:
        model: an nn.Module, an fx.GraphModule or an ExportedProgram, float32 and on the CPU.
        example_inputs: a tuple of arguments, a dict of keyword arguments, or ``(args, kwargs)``;
            optional for an ExportedProgram.
        dynamic_shapes: ``"auto"`` (every dim of every tensor input that can be dynamic is), None
            (the shapes of the examples), or what ``torch.export.export`` takes.

    Raises:
        TypeError: wrong type of model or of example inputs.
        ValueError: the model cannot be exported or compiled; the message names the place.
    """
    return normalise(capture(model, example_inputs, dynamic_shapes))


def capture(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Any = None,
    dynamic_shapes: Any = "auto",
) -> ExportedProgram:
    """The model as torch.export sees it, not decomposed; arguments as `import_torch`."""
    if isinstance(model, ExportedProgram):
        return _capture_exported(model, example_inputs, dynamic_shapes)
    if not isinstance(model, torch.nn.Module):
        hint = "; pass an instance, not the class" if isinstance(model, type) else ""
        raise TypeError(
            "model must be a torch.nn.Module, torch.fx.GraphModule or "
            f"torch.export.ExportedProgram, not {type(model).__name__}{hint}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model is a TorchScript module, which torch.export does not read; pass the "
            "nn.Module that it was scripted from"
        )
    if example_inputs is None:
        raise TypeError("example_inputs is needed to export a module; pass a tuple of tensors")
    examples = Examples.parse(example_inputs)
    check_weights(dict(model.named_parameters()), dict(model.named_buffers()))
    _check_arguments(model, examples)
    with evaluation(model), mixtures(model):
        if isinstance(dynamic_shapes, str):
            if dynamic_shapes != "auto":
                raise ValueError(
                    f"dynamic_shapes={dynamic_shapes!r} is unknown; use 'auto', None, or a "
                    "torch.export dynamic_shapes specification"
                )
            exported, examples = _export_auto(model, examples)
        else:
            exported = _export(model, examples, dynamic_shapes)
        return serve_size_one(tie_indexed_sizes(exported), examples, model)


def _capture_exported(
    exported: ExportedProgram, example_inputs: Any, dynamic_shapes: Any
) -> ExportedProgram:
    if dynamic_shapes not in ("auto", None):
        raise ValueError(
            "dynamic_shapes cannot change a program that is already exported; export it again "
            "with these dynamic_shapes, or leave the argument out"
        )
    signature = exported.graph_signature
    stored = {**exported.state_dict, **exported.constants}
    kinds = {s.target: s.kind for s in signature.input_specs if s.target in stored}
    tensors = {n: stored[n] for n in kinds if isinstance(stored[n], torch.Tensor)}
    parameters = {n: t for n, t in tensors.items() if kinds[n] == InputKind.PARAMETER}
    check_weights(parameters, {n: t for n, t in tensors.items() if n not in parameters})
    if not any(
        n.op == "placeholder" and n.name in signature.user_inputs for n in exported.graph.nodes
    ):
        raise ValueError(
            "the exported program has no tensor input, so there is nothing to compile; export "
            "a model that takes at least one tensor"
        )
    if example_inputs is None:
        example_inputs = exported.example_inputs
    if example_inputs is None or dynamic_shapes is None:
        return exported
    examples = Examples.parse(example_inputs, halves=True)
    return serve_size_one(tie_indexed_sizes(exported), examples, None)


def _export_auto(model: torch.nn.Module, examples: Examples) -> tuple[ExportedProgram, Examples]:
    """Exports with all dims dynamic; dims of size 1 widened as far as model and export allow."""
    dims = widenable(model, examples)
    while True:
        widened = examples.widened(dims)
        shapes = torch.export.ShapesCollection()
        # A tensor passed twice has one entry in the collection, so each use gets its own view.
        widened = widened.map_tensors(lambda _, x: x.view(x.shape))
        for _, x in widened.tensors():
            free = {d: torch.export.Dim.AUTO for d, size in enumerate(x.shape) if size > 1}
            if free:
                shapes[x] = free
        try:
            exported = _export(model, widened, shapes)
        except ValueError:
            if not dims:
                raise
            last = max(d for _, d in dims)
            dims = frozenset(dim for dim in dims if dim[1] != last)
            continue
        wrong = misread(exported, examples, dims)
        if not wrong:
            return exported, widened
        dims -= wrong


def _export(model: torch.nn.Module, examples: Examples, dynamic_shapes: Any) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(
                model, examples.args, examples.kwargs, dynamic_shapes=dynamic_shapes
            )
    except Exception as cause:
        raise ValueError(_why_not(model, examples, cause)) from cause


def _why_not(model: torch.nn.Module, examples: Examples, cause: Exception) -> str:
    name = type(model).__name__
    shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for _, x in examples.tensors())
    try:
        run_detached(model, examples)
    except Exception as own:
        return (
            f"{name} fails on its example inputs ({shapes}) before any compilation: "
            f"{first_line(own)}{place(own)}; pass inputs that the model accepts"
        )
    return (
        f"torch.export cannot export {name} on example inputs ({shapes}): "
        f"{type(cause).__name__}: {first_line(cause)}{place(cause)}; rewrite that operation "
        "without data-dependent Python control flow or sizes, or compile the part of the model "
        "that does not need it"
    )


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def place(error: Exception) -> str:
    """The innermost line of the user's code on the error's traceback."""
    library = str(inspect.getfile(torch)).rsplit("__init__", 1)[0]
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((library, __file__)) and "sparsify/frontend" not in f.filename
    ]
    if not frames:
        return ""
    line = frames[-1].line or linecache.getline(frames[-1].filename, frames[-1].lineno or 0)
    return f" (at {frames[-1].filename}:{frames[-1].lineno}: {line.strip()})"


def _check_arguments(model: torch.nn.Module, examples: Examples) -> None:
    if isinstance(model, fx.GraphModule):
        return
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*examples.args, **examples.kwargs)
    except TypeError as cause:
        raise ValueError(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {cause}"
        ) from cause


@contextlib.contextmanager
def evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, every module's own mode restored afterwards.

    PyTorch's fused encoder layer is switched off meanwhile: it is one opaque operator.
    """
    modes = {module: module.training for module in model.modules()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if any(modes.values()):
            try:
                model.eval()
            except NotImplementedError:  # modules unpacked from an ExportedProgram
                for module in modes:
                    module.training = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, mode in modes.items():
            module.training = mode
