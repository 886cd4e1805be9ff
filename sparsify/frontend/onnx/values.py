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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import _disable_current_modes

_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)

LARGEST: Final = 2**33
"""Bytes of the largest tensor that an import computes."""

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor whose elements are known while tracing.

    Attributes:
        tensor: never a fake one.
        name: what it is called as a weight of the program: that of an initializer, or of a node's
            output that follows from initializers alone. None for what follows from static shapes.
        sources: the names of the stored weights that its elements come from, sizes not counted.
    """

    tensor: torch.Tensor
    name: str | None = None
    sources: frozenset[str] = frozenset()

    def item(self) -> Any:
        """The only element as a Python number."""
        with untraced():
            return self.tensor.item()


Value: TypeAlias = Constant | np.ndarray | torch.Tensor | None


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Within it operators compute with real tensors, although a trace is under way.

    Not even changes of the mode of gradients are seen, of which torch.export makes sub-graphs.
    """
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


def sizes(elements: Any) -> np.ndarray:
    """Numbers and symbolic numbers, in nested lists or one alone, as an array of dtype object."""
    return np.array(elements, dtype=object)


def elementwise(compute: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """A function of numbers on each element of arrays, which broadcast."""
    return sizes(np.frompyfunc(compute, len(arrays), 1)(*(a.astype(object) for a in arrays)))


def settled(array: np.ndarray) -> Constant | np.ndarray:
    """Sizes as they are, or a constant when all of them turned out to be known."""
    elements = [_simplified(element) for element in array.flat]
    if any(isinstance(element, SYMBOLIC) for element in elements):
        made = np.empty(array.shape, object)
        made.flat[:] = elements
        return made
    with untraced():
        return Constant(torch.tensor(elements, dtype=_dtype(elements)).reshape(array.shape))


def _simplified(element: Any) -> Any:
    """A symbolic number that can have one value only as that value."""
    if isinstance(element, torch.SymBool):
        if statically_known_true(element):
            return True
        return False if statically_known_true(torch.sym_not(element)) else element
    if isinstance(element, torch.SymInt):
        value = element.node.maybe_as_int()
        return element if value is None else value
    return element


def known(value: Value) -> np.ndarray | None:
    """The elements of a constant or of sizes; None for a tensor, whose elements are not known."""
    if isinstance(value, Constant):
        with untraced():
            tensor = value.tensor.detach()
            small = tensor.is_floating_point() and tensor.dtype not in _NUMPY_FLOATS
            return (tensor.float() if small else tensor).numpy()
    return value if isinstance(value, np.ndarray) else None


def traced(array: np.ndarray) -> torch.Tensor:
    """Sizes as a tensor that is computed when the model is called."""
    dtype = _dtype(array.flat)
    elements = [torch.scalar_tensor(element, dtype=dtype) for element in array.flat]
    return torch.stack(elements).reshape(array.shape) if array.ndim else elements[0]


def _dtype(elements: Iterable[Any]) -> torch.dtype:
    """The type of sizes: integers are int64, fractions float32."""
    kinds = {type(element) for element in elements}
    if kinds & {torch.SymFloat, float, np.float32, np.float64}:
        return torch.float32
    return torch.bool if kinds and kinds <= {torch.SymBool, bool, np.bool_} else torch.int64
