"""Dense linear for few tokens from the canonical matrix, which an embedding may share.

for chunk of rows (parallel):
  for R rows, token tile:                   # R x tokens accumulators in registers
    for 16 columns: acc[r, :] += w[r, columns] * x[:, columns]
    sums over lanes, store
  bias, activation, residual
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.row_kernel import RowKernel
from sparsify.codegen.kernels.cpu.rows import (
    ahead,
    lane_sums,
    ragged_load,
    store_rows,
)
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    Tensor,
    bind,
    prefetch,
)
from sparsify.layouts import Dense

_STEP = 16
"""Columns of a step: a cache line of each row."""

_AHEAD = 256
"""Floats of each row between a prefetch and its use."""


@dataclass(frozen=True)
class DenseRowsLinear:
    """The kernel's specification.

    Attributes:
        rows: output rows that share a load of activations, a power of two.
        tokens: widest token tile, a power of two.
    """

    isa: Isa
    out_features: int
    in_features: int
    layout: Dense
    epilogue: Epilogue
    rows: int
    tokens: int

    @property
    def name(self) -> str:
        return (
            f"dense_rows_{self.isa.name}_{self.out_features}x{self.in_features}_r{self.rows}"
            f"_t{self.tokens}_{self.epilogue.name}"
        ).rstrip("_")

    def build(self) -> Any:
        """A PrimFunc ``(x, weight[, bias][, residual], y)``."""
        return _Emitter(self).build()


class DenseRowTiles:
    """Emits the sums of a unit of rows.

    Attributes:
        unit: output rows that share a load of activations.
        in_features, y_features: features of a token of ``x`` and of ``y``; those of ``y`` begin at
            ``y_first``. Sizes known only at run time are whole steps and whole units.
        out_features: known now, or None.
        x, matrix, y: the kernel's arguments.
    """

    isa: Isa
    unit: int
    x: Expr
    matrix: Expr
    y: Expr
    in_features: Expr | int
    y_features: Expr | int
    y_first: int = 0
    out_features: int | None

    def tile(self, row: Expr, token: Expr, count: int) -> None:
        """The unit's rows, as many at once as have registers for ``count`` tokens."""
        rows = max(1, min(self.unit, self.isa.registers // 2 // count))
        for r in range(0, self.unit, rows):
            self._rows(bind(row + r), rows, token, count)

    def _rows(self, row: Expr, rows: int, token: Expr, count: int) -> None:
        width, features = self.isa.vector, self.in_features
        inside, left_rows = [row + r for r in range(rows)], None
        if self.out_features is not None and self.out_features % self.unit:
            inside = [T.min(r, T.int64(self.out_features - 1)) for r in inside]
            left_rows = self.out_features - row
        w_at = [bind(r * features) for r in inside]
        x_at = [bind((token + t) * features) for t in range(count)]
        total = Registers(rows * count, width)
        total.clear()
        known = isinstance(features, int)
        whole = T.int64(features // _STEP) if known else bind(T.floordiv(features, _STEP))
        own = bind(T.max(T.int64(0), whole - _AHEAD // _STEP))

        def steps(begin: Expr, many: Expr, distance: Expr) -> None:
            with T.serial(many) as step:
                column = bind((begin + step) * _STEP)
                for at in w_at:
                    prefetch(self.matrix, at + column + distance, near=False)
                self._step(total, [at + column for at in w_at], [at + column for at in x_at], _STEP)

        # The end of a row fetches the beginning of the row that is read next in its place.
        group = self.unit * features
        steps(T.int64(0), own, ahead(token, _AHEAD, group))
        steps(own, whole - own, ahead(token, rows * features - own * _STEP, group))
        if known and (left := features % _STEP):
            begin = features - left
            self._step(total, [at + begin for at in w_at], [at + begin for at in x_at], left)
        for t in range(count):
            sums = lane_sums([total[r * count + t] for r in range(rows)], width)
            offset = bind((token + t) * self.y_features + self.y_first + row)
            store_rows(self.y, offset, sums, rows, left_rows)

    def _step(self, total: Registers, w_at: list[Expr], x_at: list[Expr], columns: int) -> None:
        width, count = self.isa.vector, len(x_at)
        for v in range(0, columns, width):
            x = [bind(ragged_load(self.x, at + v, columns - v, width)) for at in x_at]
            for r, at in enumerate(w_at):
                weight = bind(ragged_load(self.matrix, at + v, columns - v, width))
                for t in range(count):
                    total[r * count + t] = total[r * count + t] + weight * x[t]


class _Emitter(DenseRowTiles, RowKernel):
    spec: DenseRowsLinear

    def __init__(self, spec: DenseRowsLinear) -> None:
        RowKernel.__init__(self, spec, spec.rows)
        self.isa, self.unit = spec.isa, spec.rows
        self.in_features, self.y_features = spec.in_features, spec.out_features
        self.out_features = spec.out_features

    def weight(self) -> tuple[Tensor, ...]:
        return (Tensor("weight", (self.spec.out_features, self.spec.in_features)),)

    def take(self, *packed: Expr) -> None:
        (self.matrix,) = packed

    def place(self, unit: Expr) -> Expr:
        """The first row."""
        return unit * self.spec.rows
