"""ONNX models as exported programs, from which the way of a PyTorch model goes on.

.onnx --read_onnx--> OnnxModel --OnnxModule--> nn.Module --torch.export--> ExportedProgram
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from sparsify.frontend.onnx.examples import ExampleSizes, candidates, given
from sparsify.frontend.onnx.file import Shapes, read_onnx
from sparsify.frontend.onnx.interpreter import Problem
from sparsify.frontend.onnx.model import OnnxModel
from sparsify.frontend.onnx.module import OnnxModule, is_free


def capture_onnx(
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    shapes: Shapes | None = None,
    constants: Mapping[str, Any] | None = None,
    dynamic: bool = True,
    sizes: ExampleSizes | None = None,
) -> ExportedProgram:
    """The model in an ONNX file as torch.export sees it.

    Arguments are called like the file's inputs, made into Python identifiers; results are a dict
    by the names of its outputs. Dims with a name, or with none, are dynamic, and those of one name
    are one size. A `Shapes` entry makes them static, or names them.

    Args:
        example_inputs: a tuple in the file's order, or a dict by name; None makes them.
        shapes, constants: see `sparsify.frontend.onnx.file.prepare`.
        dynamic: False for the sizes of the example inputs alone.
        sizes: of the example inputs that are made.

    Raises:
        FileNotFoundError, TypeError, ValueError: what is wrong with the file or the arguments, or
            every node that cannot be imported, and why.
    """
    model = read_onnx(path, shapes=shapes, constants=constants)
    return export(model, example_inputs, dynamic=dynamic, sizes=sizes)


def export(
    model: OnnxModel,
    example_inputs: Any = None,
    *,
    dynamic: bool = True,
    sizes: ExampleSizes | None = None,
) -> ExportedProgram:
    """A model that was read as torch.export sees it; arguments as `capture_onnx`."""
    if not model.inputs:
        raise ValueError(f"{model.path}: has no inputs, so there is nothing to compile")
    module = OnnxModule(model)
    examples = _examples(model, module, example_inputs, dynamic, sizes or ExampleSizes())
    _check_weights(model, module)
    named = dict(zip(module.arguments, examples, strict=True))
    free = {
        argument: {
            dim: Dim.AUTO
            for dim in range(example.dim())
            if is_free(declared, example, dim, dynamic)
        }
        for (argument, example), declared in zip(named.items(), model.inputs, strict=True)
    }
    try:
        with torch.no_grad():
            return torch.export.export(module, tuple(examples), dynamic_shapes=free)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(
            f"{model.path}: cannot be exported at dynamic sizes: "
            f"{lines[0] if lines else type(error).__name__}; fix sizes by shapes={{name: sizes}}, "
            "on the command line by --shape name=1,3,224,224"
        ) from error


def _examples(
    model: OnnxModel,
    module: OnnxModule,
    example_inputs: Any,
    dynamic: bool,
    sizes: ExampleSizes,
) -> list[torch.Tensor]:
    """Inputs at which all nodes run."""
    if example_inputs is not None:
        tensors = given(model, module.arguments, example_inputs)
        problems = module.collect(tensors, dynamic)
        if problems:
            raise ValueError(_listed(model, problems))
        return tensors
    first: list[Problem] = []
    for tensors in candidates(model, sizes):
        problems = module.collect(tensors, dynamic)
        if not problems:
            return tensors
        first = first or problems
        if not all(problem.of_sizes for problem in problems):
            break  # other sizes would not help
    raise ValueError(_listed(model, first))


def _listed(model: OnnxModel, problems: list[Problem]) -> str:
    count = f"{len(problems)} node{'s' if len(problems) > 1 else ''}"
    lines = "".join(f"\n  {problem.text}" for problem in problems)
    text = f"{model.path}: {count} cannot be imported:{lines}"
    if any(problem.needs_sizes for problem in problems):
        dynamic = [i for i in model.inputs if not all(isinstance(size, int) for size in i.dims)]
        names = ", ".join(f"{i.name}: {i.text()}" for i in dynamic)
        text += (
            f"\nFix sizes ({names}) by shapes={{name: sizes}}, on the command line by "
            "--shape name=1,3,224,224"
        )
    if any(problem.of_sizes for problem in problems):
        text += (
            "\nIf these sizes are wrong, give others by shapes={name: sizes}, on the command line "
            "by --shape name=1,3,224,224"
        )
    return text


def _check_weights(model: OnnxModel, module: OnnxModule) -> None:
    for name, weight in module.named_parameters():
        if weight.dtype != torch.float32:
            raise ValueError(
                f"{model.path}: weight {name!r} of shape {tuple(weight.shape)} is {weight.dtype}; "
                "weights are computed with in float32, which does not hold it: if the digits do "
                "not matter, convert the file's initializers and the Cast nodes to FLOAT"
            )
