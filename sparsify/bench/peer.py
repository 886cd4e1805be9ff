"""A peer: one runtime with a model built for one thread count and one set of inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree

from sparsify.bench.harness import relative_error


@dataclass(frozen=True)
class Peer:
    """Called without arguments it runs once, on inputs already bound, and the call is timed.

    Attributes:
        name: ``torch``, ``onnxruntime``, ``openvino`` or ``sparsify``.
        version: of the runtime.
        call: one run.
        outputs: one run, its output tensors in order.
        settings: what was asked of the runtime, for the record.
        file_bytes: size of the model's file, None when there is none.
    """

    name: str
    version: str
    call: Callable[[], Any]
    outputs: Callable[[], tuple[torch.Tensor, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    file_bytes: int | None = None

    def __call__(self) -> Any:
        return self.call()

    def check(self, reference: tuple[torch.Tensor, ...], tolerance: float) -> tuple[float, float]:
        """(largest absolute, largest relative error) against ``reference``.

        Raises:
            ValueError: when the relative error exceeds ``tolerance``.
        """
        absolute, relative = relative_error(self.outputs(), reference)
        if not relative <= tolerance:
            raise ValueError(
                f"{self.name}: outputs differ from the reference by {relative:.2e} of its scale, "
                f"more than {tolerance:.0e}; the timing would compare different computations"
            )
        return absolute, relative


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as (args, kwargs).

    A tensor or a tuple is positional, a mapping by name, ``(args, kwargs)`` is itself.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], Mapping):
            return inputs[0], dict(inputs[1])
        return tuple(inputs), {}
    return (inputs,), {}


def flat_tensors(value: Any) -> tuple[torch.Tensor, ...]:
    """The tensors in a nest of tuples, mappings and model outputs, in order."""
    if isinstance(value, Mapping) and type(value) is not dict:
        value = dict(value)  # a Hugging Face output, of a class pytree may not know
    return tuple(t for t in _pytree.tree_leaves(value) if isinstance(t, torch.Tensor))


def float64_reference(model: torch.nn.Module, inputs: Any) -> tuple[torch.Tensor, ...]:
    """Outputs of a float64 copy of the model in eager PyTorch: what errors are measured against."""
    args, kwargs = _pytree.tree_map(_to_double, split_inputs(inputs))
    with torch.no_grad():
        return flat_tensors(copy.deepcopy(model).double()(*args, **kwargs))


def _to_double(value: Any) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_float else value
