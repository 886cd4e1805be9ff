"""The frame of linear kernels for few tokens: parameters, tasks, and what follows the sums.

for run of units of output rows (parallel):
  for unit, token tile: sums, stored
  bias, activation, residual
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.operands import LinearSpec, linear_operands
from sparsify.codegen.kernels.cpu.rows import finish_rows, row_tasks, token_tiles
from sparsify.codegen.kernels.cpu.simd import Expr, Tensor, bind, prim_func, symbol


class RowSpec(LinearSpec, Protocol):
    @property
    def isa(self) -> Isa: ...

    @property
    def name(self) -> str: ...

    @property
    def tokens(self) -> int:
        """Widest token tile, a power of two."""
        ...


class RowKernel(ABC):
    """Emits a kernel.

    Attributes:
        spec: of the kernel, as the subclass has it.
        unit: output rows that one task takes whole.
        tokens, x, bias, residual, y: the kernel's operands.
    """

    spec: Any

    def __init__(self, spec: RowSpec, unit: int) -> None:
        self.spec, self.unit = spec, unit

    @abstractmethod
    def weight(self) -> Sequence[Tensor]:
        """The packed tensors as parameters."""

    @abstractmethod
    def take(self, *packed: Expr) -> None:
        """Is given the packed tensors, in the order of `weight`."""

    def build(self) -> Any:
        spec: RowSpec = self.spec
        with prim_func(spec.name) as result:
            self.tokens = symbol()
            operands = linear_operands(spec, self.tokens, self.weight(), "rows")
            self.x, packed, self.bias, self.residual, self.y = operands
            self.take(*packed)
            row_tasks(spec.out_features, self.unit, self._task)
        return result[0]

    def _task(self, first: Expr, units: Expr) -> None:
        spec: RowSpec = self.spec
        row = bind(first * self.unit)
        rows = bind(T.min(units * self.unit, T.int64(spec.out_features) - row))
        self.sums(first, units, row, rows)
        finish_rows(
            spec.isa, spec.epilogue, spec.out_features, self.tokens,
            self.y, self.bias, self.residual, row, rows,
        )  # fmt: skip

    def sums(self, first: Expr, units: Expr, row: Expr, rows: Expr) -> None:
        """Stores the sums of a task: of the units from ``first``, which are the rows from ``row``.

        Unit by unit, so that a unit's weights are in cache for all tiles but the first.
        """
        with T.serial(units) as i:
            place = bind(self.place(first + i))
            token_tiles(
                self.tokens, self.spec.tokens, lambda token, count: self.tile(place, token, count)
            )

    def place(self, unit: Expr) -> Expr:
        """Where a unit lies, as `tile` takes it: by default its number."""
        return unit

    def tile(self, place: Expr, token: Expr, count: int) -> None:
        """Stores the sums of the unit at ``place`` for ``count`` tokens."""
        raise NotImplementedError
