"""Example inputs of an ONNX model, made from its declared inputs or given by the user."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsify.frontend.onnx.model import Input, OnnxModel
from sparsify.frontend.onnx.values import LARGEST

BATCH = 2
"""The first dim where it is dynamic; torch.export takes 1 for a constant."""
TOKENS, PIXELS = 128, 64
"""The other dynamic dims: of inputs of up to three dims, and of more."""
OTHERS = (224, 48, 32, 96, 256, 576, 512, 640)
"""Tried in turn where a model does not run at those sizes."""


@dataclass(frozen=True)
class ExampleSizes:
    """Sizes that the user wants of dynamic dims, the first of an input and the others."""

    batch: int | None = None
    others: int | None = None


def candidates(model: OnnxModel, sizes: ExampleSizes) -> Iterator[list[torch.Tensor]]:
    """Inputs to try, the likeliest first; one alone where all sizes are known.

    Raises:
        ValueError: an input is too large for memory, or a size is given where none is dynamic.
    """
    _check_given(model, sizes)
    dynamic = any(
        size is None or isinstance(size, str) for i in model.inputs for size in i.dims[1:]
    )
    tried: list[int | None] = [sizes.others]
    if sizes.others is None and dynamic:
        tried += OTHERS
    for others in tried:
        named: dict[str, int] = {}
        batch = sizes.batch or BATCH
        shapes = [_shape(declared, batch, others, named) for declared in model.inputs]
        # A name may be that of a batch only in a later input.
        shapes = [
            [named.get(str(name), size) for name, size in zip(i.dims, shape, strict=True)]
            for i, shape in zip(model.inputs, shapes, strict=True)
        ]
        yield [_example(i, shape, model) for i, shape in zip(model.inputs, shapes, strict=True)]


def _check_given(model: OnnxModel, sizes: ExampleSizes) -> None:
    first = any(not isinstance(size, int) for i in model.inputs for size in i.dims[:1])
    other = any(not isinstance(size, int) for i in model.inputs for size in i.dims[1:])
    for name, size, dynamic in (("batch", sizes.batch, first), ("sequence", sizes.others, other)):
        if size is not None and not dynamic:
            raise ValueError(
                f"{model.path}: a {name} of {size} was asked for, but the file fixes that size in "
                "each of its inputs; give shapes that make it dynamic, or leave it out"
            )


def _shape(declared: Input, batch: int, others: int | None, named: dict[str, int]) -> list[int]:
    """Sizes of all dims; ``named`` gets the smallest that goes with each name."""
    usual = TOKENS if len(declared.dims) <= 3 else PIXELS
    shape = [
        size if isinstance(size, int) else batch if dim == 0 else others or usual
        for dim, size in enumerate(declared.dims)
    ]
    for name, size in zip(declared.dims, shape, strict=True):
        if isinstance(name, str):
            named[name] = min(named.get(name, size), size)
    return shape


def _example(declared: Input, shape: list[int], model: OnnxModel) -> torch.Tensor:
    count = math.prod(shape) * declared.dtype.itemsize
    if count > LARGEST:
        raise ValueError(
            f"{model.path}: input {declared.name!r} of shape {shape} takes {count / 2**30:.0f} GiB"
        )
    generator = torch.Generator().manual_seed(0)
    if declared.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(declared.dtype)
    # Ones are valid token ids, segment ids, masks and lengths alike.
    return torch.ones(shape, dtype=declared.dtype)


def given(model: OnnxModel, names: Sequence[str], example_inputs: Any) -> list[torch.Tensor]:
    """The user's example inputs in the order of the model's.

    Args:
        names: of the arguments, which are accepted as well as the file's names.

    Raises:
        TypeError, ValueError: what is missing, unknown, or of another type or shape than declared.
    """
    if isinstance(example_inputs, tuple) and len(example_inputs) == 2:
        args, kwargs = example_inputs
        if isinstance(args, tuple | list) and isinstance(kwargs, Mapping):
            example_inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    if isinstance(example_inputs, tuple | list):
        if len(example_inputs) != len(names):
            raise TypeError(
                f"{model.path}: takes {len(names)} inputs ({', '.join(names)}), "
                f"{len(example_inputs)} were given"
            )
        example_inputs = dict(zip(names, example_inputs, strict=True))
    if not isinstance(example_inputs, Mapping):
        raise TypeError(
            "example_inputs must be a tuple of tensors or a dict of them by input name, not "
            f"{type(example_inputs).__name__}"
        )
    by_argument = {i.name: name for i, name in zip(model.inputs, names, strict=True)}
    found = {by_argument.get(name, name): value for name, value in example_inputs.items()}
    if found.keys() != set(names):
        raise TypeError(
            f"{model.path}: example_inputs are {', '.join(example_inputs)}; the model takes "
            f"{', '.join(i.name for i in model.inputs)}"
        )
    tensors = [found[name] for name in names]
    for declared, tensor in zip(model.inputs, tensors, strict=True):
        _check(declared, tensor, model)
    return tensors


def _check(declared: Input, tensor: Any, model: OnnxModel) -> None:
    where = f"{model.path}: example input {declared.name!r}"
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{where} is {type(tensor).__name__}; it must be a torch.Tensor")
    fits = tensor.dtype == declared.dtype and len(tensor.shape) == len(declared.dims)
    if not fits or any(
        isinstance(size, int) and size != found
        for size, found in zip(declared.dims, tensor.shape, strict=False)
    ):
        raise ValueError(
            f"{where} is {tensor.dtype} of shape {tuple(tensor.shape)}; the model takes "
            f"{declared.dtype} of shape {declared.text()}"
        )
