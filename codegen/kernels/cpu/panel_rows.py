"""Dense linear for few tokens from the panels that many tokens use: one packing for both.

A panel's floats run over its R rows first, then along in_features. A vector of them holds parts of
several rows; the activations that meet it are a fixed shuffle of neighbouring ones, and the pattern
repeats after lcm(R, width) floats. With R = 6 and 16 lanes, w[row, k]::

    w[0,0] w[1,0] ... w[5,0] w[0,1] ... w[5,1] w[0,2] ... w[3,2] | w[4,2] ...
    x[0]   x[0]   ... x[0]   x[1]   ... x[1]   x[2]   ... x[2]   | x[2]   ...

for chunk of panels (parallel):
  for P panels, token tile:
    for period: acc[panel, vector, :] += w * shuffle(x)
    sum the lanes of each row, store
  bias, activation, residual
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.row_kernel import RowKernel
from sparsify.codegen.kernels.cpu.rows import (
    ahead,
    ragged_load,
)
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    Tensor,
    bind,
    load,
    prefetch,
    splat,
    store,
)
from sparsify.layouts import PackedDense

_AHEAD = 512
"""Floats of a panel between a prefetch and its use."""

_LINE = 16
"""Floats of a cache line."""


@dataclass(frozen=True)
class PanelRowsLinear:
    """The kernel's specification.

    Attributes:
        panels: panels that share the shuffles of activations.
        tokens: widest token tile, a power of two.
    """

    isa: Isa
    out_features: int
    in_features: int
    layout: PackedDense
    epilogue: Epilogue
    panels: int
    tokens: int

    @property
    def name(self) -> str:
        return (
            f"panel_rows_{self.isa.name}_{self.out_features}x{self.in_features}"
            f"_r{self.layout.rows}_p{self.panels}_t{self.tokens}_{self.epilogue.name}"
        ).rstrip("_")

    def build(self) -> Any:
        """A PrimFunc ``(x, panels[, bias][, residual], y)``."""
        return _Emitter(self).build()


class _Emitter(RowKernel):
    spec: PanelRowsLinear

    def __init__(self, spec: PanelRowsLinear) -> None:
        super().__init__(spec, spec.layout.rows * spec.panels)
        self.rows = spec.layout.rows
        self.period = math.lcm(self.rows, spec.isa.vector)
        self.vectors = self.period // spec.isa.vector
        self.columns = self.period // self.rows
        self.panel_count = -(-spec.out_features // self.rows)

    def weight(self) -> tuple[Tensor, ...]:
        return (Tensor("panels", (self.panel_count, self.spec.in_features, self.rows)),)

    def take(self, *packed: Expr) -> None:
        (self.panels,) = packed

    def place(self, unit: Expr) -> Expr:
        """The first panel."""
        return unit * self.spec.panels

    def tile(self, panel: Expr, token: Expr, count: int) -> None:
        spec = self.spec
        ragged = self.panel_count % spec.panels != 0
        last = T.int64(self.panel_count - 1)
        inside = [T.min(panel + p, last) if ragged else panel + p for p in range(spec.panels)]
        w_at = [bind(p * (spec.in_features * self.rows)) for p in inside]
        x_at = [bind((token + t) * spec.in_features) for t in range(count)]
        total = Registers(spec.panels * self.vectors * count, spec.isa.vector)
        total.clear()
        distance = ahead(token, _AHEAD, self.unit * spec.in_features)
        whole = spec.in_features // self.columns
        with T.serial(T.int64(whole)) as step:
            w_step, x_step = bind(step * self.period), bind(step * self.columns)
            for at in w_at:
                for line in range(0, self.period, _LINE):
                    prefetch(self.panels, at + w_step + distance + line)
            self._step(
                total, [at + w_step for at in w_at], [at + x_step for at in x_at], self.columns
            )
        if left := spec.in_features - whole * self.columns:
            w_end, x_end = whole * self.period, whole * self.columns
            self._step(total, [at + w_end for at in w_at], [at + x_end for at in x_at], left)
        for p in range(spec.panels):
            row = bind((panel + p) * self.rows)
            for t in range(count):
                parts = [total[(p * self.vectors + v) * count + t] for v in range(self.vectors)]
                self._store(parts, bind((token + t) * spec.out_features + row), row)

    def _step(self, total: Registers, w_at: list[Expr], x_at: list[Expr], columns: int) -> None:
        width, count = self.spec.isa.vector, len(x_at)
        x = [bind(ragged_load(self.x, at, columns, self.columns)) for at in x_at]
        for v in range(self.vectors):
            left = columns * self.rows - v * width
            if left <= 0:
                break
            shuffled = [bind(self._shuffled(value, v)) for value in x]
            for p, at in enumerate(w_at):
                weight = bind(ragged_load(self.panels, at + v * width, left, width))
                for t in range(count):
                    i = (p * self.vectors + v) * count + t
                    total[i] = total[i] + weight * shuffled[t]

    def _shuffled(self, x: Expr, vector: int) -> Expr:
        """The activations that meet a vector of the period."""
        width = self.spec.isa.vector
        if self.columns == 1:
            return splat(x, width)
        lanes = [(vector * width + lane) // self.rows for lane in range(width)]
        return T.Shuffle([x] * -(-width // self.columns), lanes)

    def _store(self, parts: list[Expr], offset: Expr, row: Expr) -> None:
        """Sums the lanes of each row by way of the stack."""
        width = self.spec.isa.vector
        lanes = 1 << (self.rows - 1).bit_length()
        stack = T.alloc_buffer((self.period + lanes,), "float32", scope="global")
        for v, part in enumerate(parts):
            store(stack, v * width, part, width)
        sums = load(stack, 0, lanes)
        for k in range(1, self.columns):
            sums = sums + load(stack, k * self.rows, lanes)
        store(stack, 0, bind(sums), lanes)
        for r in range(self.rows):
            if self.spec.out_features % self.unit:
                with T.If(row + r < self.spec.out_features), T.Then():
                    store(self.y, offset + r, stack[r], 1)
            else:
                store(self.y, offset + r, stack[r], 1)
