"""One entry of a compiled model: called like the function that it was captured from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparsify.arguments import TensorInput
from sparsify.engine import Engine, Executor
from sparsify.plan import Plan
from sparsify.program import Program
from sparsify.signature import CallSignature


class Entry:
    """A program bound to its weights and kernels; calls from several threads may overlap.

    Tensors that the program changes in place, such as a cache of keys and values, are the
    caller's: two calls that overlap must be given different ones.

    Args:
        weights: those of all entries of the model; they are shared, not copied.
        parameters: see `CallSignature`.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        parameters: tuple[str, ...],
        executor: Executor | None,
    ) -> None:
        self.name = program.name
        self.plan = Plan.of(program)
        self._program = program
        self._engine = Engine(self.plan, weights, executor)
        self._signature = CallSignature(program.exported, parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program.

        Raises:
            TypeError: a missing, unknown or repeated argument, a wrong type or dtype.
            ValueError: a wrong shape, size, device or constant, or state that kernels cannot
                change where it lies.
        """
        tensors, sizes = self._signature.bind(args, kwargs)
        return self._signature.results(self._engine(tensors, sizes))

    @property
    def inputs(self) -> tuple[TensorInput, ...]:
        """The tensors that it takes, in order: names, dtypes, shapes, and which are state."""
        return self._signature.tensors

    @property
    def graph(self) -> str:
        """The program that runs, as text."""
        return str(self._program.graph)

    def __str__(self) -> str:
        return f"{self.name}{self._signature}"
