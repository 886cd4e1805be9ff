"""ONNX files on the command line: ``--shape x=1,3,?,?`` and ``--constant rate=16000``."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram


@dataclass(frozen=True)
class OnnxOptions:
    """What the options ``--shape`` and ``--constant`` say about inputs, as they were typed."""

    shapes: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()

    @classmethod
    def of(cls, shape: Sequence[str] | None, constant: Sequence[str] | None) -> OnnxOptions:
        return cls(tuple(shape or ()), tuple(constant or ()))

    def __bool__(self) -> bool:
        return bool(self.shapes or self.constants)

    def load(self, path: str, batch: int | None, seq: int | None) -> ExportedProgram:
        """The model in an ONNX file.

        Args:
            batch, seq: sizes of the example inputs that are made: of dynamic dims, the first of an
                input and the others.
        """
        from sparsify.frontend.onnx.capture import capture_onnx
        from sparsify.frontend.onnx.examples import ExampleSizes

        return capture_onnx(
            path,
            shapes=dict(_shape(text) for text in self.shapes),
            constants=dict(_constant(text) for text in self.constants),
            sizes=ExampleSizes(batch, seq),
        )

    def feeds(self, path: str, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What another runtime is given for the file's inputs, constants among them."""
        import onnx

        from sparsify.frontend.onnx.tensors import torch_type

        types = {
            value.name: torch_type(value.type.tensor_type.elem_type)
            for value in onnx.load(path, load_external_data=False).graph.input
        }
        fixed = dict(map(_constant, self.constants))
        given = dict(zip(self.inputs(path).values(), tensors, strict=True))
        return given | {n: torch.as_tensor(value, dtype=types[n]) for n, value in fixed.items()}

    def inputs(self, path: str) -> dict[str, str]:
        """What the inputs of a file are called there, by the names of the arguments."""
        import onnx

        from sparsify.frontend.onnx.module import identifiers

        graph = onnx.load(path, load_external_data=False).graph
        stored = {tensor.name for tensor in graph.initializer}
        stored |= {tensor.values.name for tensor in graph.sparse_initializer}
        stored |= {_constant(text)[0] for text in self.constants}
        names = [value.name for value in graph.input if value.name not in stored]
        return dict(zip(identifiers(names), names, strict=True))


def _shape(text: str) -> tuple[str, tuple[int | str | None, ...]]:
    """``x=batch,3,?``: a name and its sizes; input names may hold anything but the last ``=``."""
    name, equals, sizes = text.rpartition("=")
    parts = [part.strip() for part in sizes.split(",")] if sizes.strip() else []
    if not equals or not name or not all(parts):
        raise ValueError(f"--shape {text}: write NAME=SIZES, such as x=1,3,224,224")
    return name, tuple(_size(part, text) for part in parts)


def _size(part: str, text: str) -> int | str | None:
    if part == "?":
        return None
    if part.lstrip("-").isdigit():
        return int(part)
    if not part.isidentifier():
        raise ValueError(
            f"--shape {text}: {part!r} is neither a number, nor ? or a name for a dynamic size; "
            "sizes are separated by commas, such as x=1,3,224,224"
        )
    return part


def _constant(text: str) -> tuple[str, Any]:
    name, equals, value = text.rpartition("=")
    try:
        if not equals or not name:
            raise ValueError
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            f"--constant {text}: write NAME=VALUE with a number or a list, such as rate=16000"
        ) from error
