"""What an ONNX graph computes with while it is traced: constants, sizes, and tensors.

A value is one of

- `Constant`: its elements are known, because it derives from weights and static shapes alone;
- sizes, a NumPy array of dtype object: elements are numbers or ``torch.SymInt`` and the like,
  because it derives from dynamic sizes (Shape -> Gather -> Mul -> Concat);
- ``torch.Tensor``: computed when the model is called;
- None: an optional input that is left out, or an output that nobody wants.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor whose elements are known while tracing.

    Attributes:
        tensor: never a fake one.
        name: what it is called as a weight of the program: that of an initializer, or of a node's
            output that follows from initializers alone. None for what follows from static shapes.
    """

    tensor: torch.Tensor
    name: str | None = None

    def item(self) -> Any:
        """The only element as a Python number."""
        with untraced():
            return self.tensor.item()


Value: TypeAlias = Constant | np.ndarray | torch.Tensor | None


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Within it operators compute with real tensors, although a trace is under way."""
    with _disable_current_modes(), torch.no_grad():
        yield


def sizes(elements: Any) -> np.ndarray:
    """Numbers and symbolic numbers, in nested lists or one alone, as an array of dtype object."""
    return np.array(elements, dtype=object)


def is_symbolic(array: np.ndarray) -> bool:
    """Whether any element is not known while tracing."""
    return any(isinstance(element, SYMBOLIC) for element in array.flat)


def settled(array: np.ndarray) -> Constant | np.ndarray:
    """Sizes as they are, or a constant when all of them turned out to be known."""
    if array.dtype == object and is_symbolic(array):
        return array
    plain = np.array(array.tolist()) if array.dtype == object else np.ascontiguousarray(array)
    if array.dtype == object and plain.dtype == np.float64:
        plain = plain.astype(np.float32)
    if array.dtype == object and not array.size:
        plain = plain.astype(np.int64)
    with untraced():
        return Constant(torch.from_numpy(plain.reshape(array.shape)))


def known(value: Value) -> np.ndarray | None:
    """The elements of a constant or of sizes; None for a tensor, whose elements are not known."""
    if isinstance(value, Constant):
        with untraced():
            return value.tensor.detach().numpy()
    return value if isinstance(value, np.ndarray) else None


def traced(array: np.ndarray) -> torch.Tensor:
    """Sizes as a tensor that is computed when the model is called."""
    kinds = {type(element) for element in array.flat}
    if kinds & {torch.SymFloat, float}:
        dtype = torch.float32
    elif kinds <= {torch.SymBool, bool}:
        dtype = torch.bool
    else:
        dtype = torch.int64
    elements = [torch.scalar_tensor(element, dtype=dtype) for element in array.flat]
    return torch.stack(elements).reshape(array.shape) if array.ndim else elements[0]
