"""An ONNX model that was read, checked and made ready to run."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import torch

from sparsify.frontend.onnx.functions import Functions


@dataclass(frozen=True)
class Input:
    """A declared input; a dim is a size, the name of a dynamic size, or None for any."""

    name: str
    dtype: torch.dtype
    dims: tuple[int | str | None, ...]

    def text(self) -> str:
        """The shape as one reads it: ``(batch, 3, ?, ?)``."""
        return f"({', '.join('?' if size is None else str(size) for size in self.dims)})"


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """A graph without sparse or external initializers.

    Attributes:
        path: what error messages call it.
        versions: of each operator domain.
        inputs, outputs: those that a caller gives and gets, in the file's order.
        output_types: of the outputs, None where the file does not say.
        functions: model-local ones, of which some may not be inlined.
    """

    path: str
    graph: onnx.GraphProto
    versions: dict[str, int]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    output_types: tuple[torch.dtype | None, ...]
    functions: Functions
