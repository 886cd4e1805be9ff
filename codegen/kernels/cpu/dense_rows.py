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
from sparsify.codegen.kernels.cpu.rows import (
    ahead,
    finish_rows,
    lane_sums,
    ragged_load,
    row_tasks,
    store_rows,
    token_tiles,
)
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    Tensor,
    arguments,
    bind,
    prefetch,
    prim_func,
    symbol,
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


class _Emitter:
    def __init__(self, spec: DenseRowsLinear) -> None:
        self.spec = spec

    def build(self) -> Any:
        spec = self.spec
        with prim_func(spec.name) as result:
            self.tokens = symbol()
            features = (self.tokens, spec.out_features)
            self.x, self.weight, self.bias, self.residual, self.y = arguments(
                Tensor("x", (self.tokens, spec.in_features)),
                Tensor("weight", (spec.out_features, spec.in_features)),
                Tensor("bias", (spec.out_features,)) if spec.epilogue.bias else None,
                Tensor("residual", features) if spec.epilogue.residual else None,
                Tensor("y", features),
            )
            row_tasks(spec.out_features, spec.rows, self._task)
        return result[0]

    def _task(self, first: Expr, groups: Expr) -> None:
        spec = self.spec
        with T.serial(groups) as i:
            row = bind((first + i) * spec.rows)
            token_tiles(self.tokens, spec.tokens, lambda token, n: self._tiles(row, token, n))
        row = bind(first * spec.rows)
        rows = bind(T.min(groups * spec.rows, T.int64(spec.out_features) - row))
        finish_rows(
            spec.isa, spec.epilogue, spec.out_features, self.tokens,
            self.y, self.bias, self.residual, row, rows,
        )  # fmt: skip

    def _tiles(self, row: Expr, token: Expr, count: int) -> None:
        """The rows of a group, as many at once as have registers for ``count`` tokens."""
        rows = max(1, min(self.spec.rows, self.spec.isa.registers // 2 // count))
        for r in range(0, self.spec.rows, rows):
            self._tile(bind(row + r), rows, token, count)

    def _tile(self, row: Expr, rows: int, token: Expr, count: int) -> None:
        spec, width = self.spec, self.spec.isa.vector
        ragged = spec.out_features % spec.rows != 0
        last = T.int64(spec.out_features - 1)
        inside = [T.min(row + r, last) if ragged else row + r for r in range(rows)]
        w_at = [bind(r * spec.in_features) for r in inside]
        x_at = [bind((token + t) * spec.in_features) for t in range(count)]
        total = Registers(rows * count, width)
        total.clear()
        distance = ahead(token, _AHEAD, spec.rows * spec.in_features)
        whole = spec.in_features // _STEP
        with T.serial(T.int64(whole)) as step:
            column = bind(step * _STEP)
            for at in w_at:
                prefetch(self.weight, at + column + distance)
            self._step(total, [at + column for at in w_at], [at + column for at in x_at], _STEP)
        if left := spec.in_features - whole * _STEP:
            begin = whole * _STEP
            self._step(total, [at + begin for at in w_at], [at + begin for at in x_at], left)
        for t in range(count):
            sums = lane_sums([total[r * count + t] for r in range(rows)], width)
            offset = bind((token + t) * spec.out_features + row)
            left_rows = spec.out_features - row if ragged else None
            store_rows(self.y, offset, sums, rows, left_rows)

    def _step(self, total: Registers, w_at: list[Expr], x_at: list[Expr], columns: int) -> None:
        width, count = self.spec.isa.vector, len(x_at)
        for v in range(0, columns, width):
            x = [bind(ragged_load(self.x, at + v, columns - v, width)) for at in x_at]
            for r, at in enumerate(w_at):
                weight = bind(ragged_load(self.weight, at + v, columns - v, width))
                for t in range(count):
                    total[r * count + t] = total[r * count + t] + weight * x[t]
