"""An ONNX model as an nn.Module, which torch.export captures like any other.

Arguments are called like the model's inputs (made into Python identifiers: ``input.1`` becomes
``input_1``), results are a dict by the outputs' names.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from sparsify.frontend.onnx.interpreter import Interpreter, Problem, Scope
from sparsify.frontend.onnx.model import Input, OnnxModel
from sparsify.frontend.onnx.tensors import narrowed, widened
from sparsify.frontend.onnx.values import Constant, Value, traced
from sparsify.frontend.onnx.weights import Weights


class OnnxModule(Weights):
    """Runs the model's graph; constants that tensors meet are its parameters and buffers."""

    def __init__(self, model: OnnxModel) -> None:
        super().__init__()
        self.model = model
        self.arguments = identifiers(i.name for i in model.inputs)
        self.interpreter = Interpreter(model.versions, self, model.functions)
        signature = inspect.Signature(
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in self.arguments]
        )

        def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> dict[str, torch.Tensor]:
            results = self._run(signature.bind(*args, **kwargs).args)
            named = zip(model.outputs, results, model.output_types, strict=True)
            return {name: _result(value, dtype) for name, value, dtype in named}

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward

    def collect(self, examples: Iterable[torch.Tensor], dynamic: bool = True) -> list[Problem]:
        """Makes weights of the constants; returns what is wrong with nodes, nothing if all ran.

        Nothing is computed, only shapes, of which the same are symbolic as in `export`.
        """
        self.collecting = True
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        try:
            with mode, enable_python_dispatcher(), torch.no_grad():
                inputs = [
                    mode.from_tensor(example, symbolic_context=_context(declared, example, dynamic))
                    for declared, example in zip(self.model.inputs, examples, strict=True)
                ]
                self._run(inputs)
        except ValueError as error:
            raise ValueError(f"{self.model.path}: {error}") from error
        finally:
            self.collecting = False
        problems = list(self.interpreter.problems)
        self.interpreter.problems.clear()
        return problems

    def _run(self, inputs: Iterable[torch.Tensor]) -> list[Value]:
        inputs = list(inputs)
        self._unify(inputs)
        return self.interpreter.run(self.model.graph, Scope(), list(map(widened, inputs)))

    def _unify(self, inputs: list[torch.Tensor]) -> None:
        """Dims of one name have one size."""
        first: dict[str, Any] = {}
        for declared, tensor in zip(self.model.inputs, inputs, strict=True):
            for dim, size in zip(declared.dims, tensor.shape, strict=True):
                if isinstance(dim, str):
                    same = first.setdefault(dim, size) == size
                    torch._check(same, lambda: "dims of one name must have one size")


def is_free(declared: Input, example: torch.Tensor, dim: int, dynamic: bool) -> bool:
    """Whether a dim is exported as dynamic."""
    return dynamic and not isinstance(declared.dims[dim], int) and example.shape[dim] > 1


def _context(declared: Input, example: torch.Tensor, dynamic: bool) -> StatelessSymbolicContext:
    free = [is_free(declared, example, dim, dynamic) for dim in range(example.dim())]
    return StatelessSymbolicContext([DimDynamic.DYNAMIC if f else DimDynamic.STATIC for f in free])


def _result(value: Value, dtype: torch.dtype | None) -> Any:
    """An output as a tensor; what is computed in float32 is rounded to the declared halves."""
    tensor = value.tensor if isinstance(value, Constant) else value
    tensor = traced(tensor) if isinstance(tensor, np.ndarray) else tensor
    return tensor if tensor is None or tensor.dtype == dtype else narrowed(tensor, dtype)


def identifiers(names: Iterable[str]) -> tuple[str, ...]:
    """Names as Python identifiers, each another one."""
    made: list[str] = []
    for name in names:
        plain = re.sub(r"\W", "_", name)
        if not plain.isidentifier() or keyword.iskeyword(plain):
            plain = f"input_{plain}"
        while plain in made:
            plain += "_"
        made.append(plain)
    return tuple(made)
