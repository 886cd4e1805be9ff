"""What the errors of ``sparsify benchmark`` are measured against."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from sparsify.bench import flat_tensors, float64_reference, split_inputs


@dataclass(frozen=True)
class Reference:
    """What errors are measured against, and what it is."""

    outputs: tuple[torch.Tensor, ...]
    name: str

    @classmethod
    def of(cls, module: torch.nn.Module, inputs: Any) -> Reference:
        """Eager float64; where a model insists on its own dtypes, eager float32."""
        try:
            return cls(float64_reference(module, inputs), "float64 eager PyTorch")
        except (RuntimeError, AssertionError):
            args, kwargs = split_inputs(inputs)
            with torch.no_grad():
                outputs = flat_tensors(module(*args, **kwargs))
            return cls(copy.deepcopy(outputs), "float32 eager PyTorch")
