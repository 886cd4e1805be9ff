"""Dense linear in lanes, weight in panels: the density-1 member of the kernel family.

for chunk of panels, token tile (parallel):
  for K block:                              # its activations stay in the first-level cache
    for panel of R output features:         # R x vectors accumulators in registers
      for k: acc[r, :] += panel[k, r] * x[k, tokens]
      store
  activation, residual
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.operands import linear_operands
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    LaneTile,
    Registers,
    Tensor,
    bind,
    choose,
    load,
    prefetch,
    prim_func,
    splat,
    store,
    symbol,
    tiled_tasks,
)
from sparsify.layouts import LANES, PackedDense

_AHEAD = 512
"""Floats of the panel stream between a prefetch and its use."""


@dataclass(frozen=True)
class DenseLinear:
    """The kernel's specification; see `SellLinear` for the fields."""

    isa: Isa
    out_features: int
    in_features: int
    layout: PackedDense
    epilogue: Epilogue
    vectors: int
    chunk_panels: int
    k_block: int

    @property
    def name(self) -> str:
        return (
            f"dense_{self.isa.name}_{self.out_features}x{self.in_features}_r{self.layout.rows}"
            f"_v{self.vectors}_c{self.chunk_panels}_k{self.k_block}_{self.epilogue.name}"
        ).rstrip("_")

    def build(self) -> Any:
        """A PrimFunc ``(x, panels[, bias][, residual], y)``."""
        return _Emitter(self).build()


class _Emitter:
    def __init__(self, spec: DenseLinear) -> None:
        self.spec = spec
        self.rows = spec.layout.rows
        self.panel_count = -(-spec.out_features // self.rows)
        self.blocks = -(-spec.in_features // spec.k_block)

    def build(self) -> Any:
        spec = self.spec
        with prim_func(spec.name) as result:
            groups = symbol()
            weight = [Tensor("panels", (self.panel_count, spec.in_features, self.rows))]
            operands = linear_operands(spec, groups, weight, "lanes")
            self.x, (self.panels,), self.bias, self.residual, self.y = operands
            chunks = -(-self.panel_count // spec.chunk_panels)
            tiled_tasks(spec.isa, groups, chunks, spec.vectors, self._task)
        return result[0]

    def _task(self, tile: LaneTile, index: Expr, chunk: Expr) -> None:
        spec = self.spec
        x_base = bind(tile.base(index, spec.in_features))
        y_base = bind(tile.base(index, spec.out_features))
        first = bind(chunk * spec.chunk_panels)
        panels = bind(T.min(T.int64(spec.chunk_panels), T.int64(self.panel_count) - first))
        with T.serial(T.int64(self.blocks)) as block:
            begin = bind(block * spec.k_block)
            depth = bind(T.min(T.int64(spec.k_block), T.int64(spec.in_features) - begin))
            with T.serial(panels) as panel:
                self._panel(tile, bind(first + panel), block, begin, depth, x_base, y_base)
        row = bind(first * self.rows)
        rows = bind(T.min(panels * self.rows, T.int64(spec.out_features) - row))
        spec.epilogue.activate(tile, spec.out_features, self.y, self.residual, y_base, row, rows)

    def _panel(
        self,
        tile: LaneTile,
        panel: Expr,
        block: Expr,
        begin: Expr,
        depth: Expr,
        x_base: Expr,
        y_base: Expr,
    ) -> None:
        spec, width = self.spec, self.spec.isa.vector
        row = bind(panel * self.rows)
        total = Registers(self.rows * tile.vectors, width)
        y_at = bind(y_base + row * LANES)

        def cell(r: int, v: int) -> Expr:
            return y_at + (r * LANES + tile.step(v, spec.out_features))

        def inside(r: int) -> Expr:
            # A padding row of the last panel reads the last feature's place and is never stored.
            padded = spec.out_features % self.rows
            return T.min(row + r, T.int64(spec.out_features - 1)) if padded else row + r

        def from_bias() -> None:
            for r in range(self.rows):
                start = bind(spec.epilogue.start(self.bias, inside(r), width))
                for v in range(tile.vectors):
                    total[r * tile.vectors + v] = start

        def from_memory() -> None:
            for r in range(self.rows):
                for v in range(tile.vectors):
                    at = y_base + inside(r) * LANES + tile.step(v, spec.out_features)
                    total[r * tile.vectors + v] = load(self.y, at, width)

        choose(self.blocks > 1, block == 0, from_bias, from_memory)
        w_at = bind((panel * spec.in_features + begin) * self.rows)
        x_at = bind(x_base + begin * LANES)
        with T.serial(depth) as k:
            prefetch(self.panels, w_at + k * self.rows + _AHEAD)
            x = [
                bind(load(self.x, x_at + k * LANES + tile.step(v, spec.in_features), width))
                for v in range(tile.vectors)
            ]
            for r in range(self.rows):
                weight = bind(splat(self.panels[w_at + k * self.rows + r], width))
                for v in range(tile.vectors):
                    i = r * tile.vectors + v
                    total[i] = total[i] + weight * x[v]

        def put(finish: bool) -> None:
            def row_of(r: int) -> None:
                for v in range(tile.vectors):
                    value = total[r * tile.vectors + v]
                    if finish:
                        value = spec.epilogue.stored(value, self.residual, cell(r, v), width)
                    store(self.y, cell(r, v), value, width)

            for r in range(self.rows):
                if spec.out_features % self.rows:
                    with T.If(row + r < spec.out_features), T.Then():
                        row_of(r)
                else:
                    row_of(r)

        last = block == self.blocks - 1
        choose(self.blocks > 1, last, lambda: put(True), lambda: put(False))
