"""Dense linear in lanes, weight in panels: the density-1 member of the kernel family.

for chunk of panels, token tile (parallel):
  for K block:                              # its activations stay in the first-level cache
    for panel of R output features:         # R x vectors accumulators in registers
      for k: acc[r, :] += panel[k, r] * x[k, tokens]
      store
  activation, residual
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.lane_linear import LaneLinear, LaneTiles
from sparsify.codegen.kernels.cpu.operands import linear_operands
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    LaneTile,
    Registers,
    Tensor,
    bind,
    ceil_div,
    choose,
    i64,
    lane_factors,
    load,
    prefetch,
    prim_func,
    splat,
    store,
    symbol,
    tiled_tasks,
)
from sparsify.layouts import PackedDense

_AHEAD = 512
"""Floats of the panel stream between a prefetch and its use."""

_CHAINS = 8
"""Sums that keep two multiply-adds a cycle busy, each taking four cycles."""


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


class DenseTiles(LaneTiles):
    """Emits the loops over K blocks and panels of one task.

    Attributes:
        rows: output features of a panel.
        panel_count, chunk_panels: panels of the weight, and of one task.
        in_features, out_features: features of ``x`` and of ``y``.
        ragged: ``y`` has no room for the padding rows of the last panel.
        side_by_side: the weights of a panel's column are neighbours, in fp32.
        x, panels, y: the kernel's arguments, to be set before `task`.
    """

    panels: Expr
    side_by_side: ClassVar[bool] = True

    def __init__(self, isa: Isa, rows: int, k_block: int, chunk_panels: int, ragged: bool) -> None:
        self.isa, self.rows, self.k_block = isa, rows, k_block
        self.chunk_panels, self.ragged = chunk_panels, ragged

    def set_sizes(self, features: tuple[Expr | int, Expr | int], panel_count: Expr | int) -> None:
        """Sizes, of which any may be known only at run time; features are (out, in)."""
        self.out_features, self.in_features = features
        self.panel_count = panel_count
        self.blocks = ceil_div(self.in_features, self.k_block)
        self.blocked = not isinstance(self.blocks, int) or self.blocks > 1

    def task(self, tile: LaneTile, chunk: Expr, x_base: Expr, y_base: Expr) -> tuple[Expr, Expr]:
        """All sums of a chunk of panels and a tile of tokens; its first panel and how many."""
        first = bind(chunk * self.chunk_panels)
        panels = bind(T.min(T.int64(self.chunk_panels), i64(self.panel_count) - first))
        with T.serial(i64(self.blocks)) as block:
            begin = bind(block * self.k_block)
            depth = bind(T.min(T.int64(self.k_block), i64(self.in_features) - begin))
            done: Expr | int = 0
            for together in self._together(tile):
                runs = bind(T.floordiv(panels - done, together))
                with T.serial(runs) as run:
                    panel = bind(first + (done + run * together))
                    self._panels(tile, panel, together, block, begin, depth, x_base, y_base)
                done = bind(done + runs * together)
        return first, panels

    @property
    def column(self) -> Expr | int:
        """From one column of a row to the next."""
        return self.rows

    def row_places(self, panel: Expr, column: Expr) -> list[Expr]:
        """Where each row of a panel has its weight of a column."""
        first = bind((panel * self.in_features + column) * self.rows)
        return [first + r for r in range(self.rows)]

    def fetch(self, w_at: list[Expr], k: Expr) -> None:
        """Asks for what is used some columns behind ``k``.

        By turns: a line lasts for more than two steps, and a prefetch takes a load's place.
        """
        panels = w_at[:: self.rows]
        at = panels[0]
        if len(panels) > 1:
            at = at + T.floormod(k, len(panels)) * (self.in_features * self.rows)
        prefetch(self.panels, at + k * self.column + _AHEAD)

    def weight_at(self, place: Expr) -> Expr:
        """A weight as fp32."""
        return self.panels[place]

    def weights(self, places: list[Expr]) -> Iterator[Expr]:
        """A column's weights as factors of vectors."""
        if not (self.isa.lane_factors and self.side_by_side):
            yield from (bind(splat(self.weight_at(at), self.isa.vector)) for at in places)
            return
        for first in range(0, len(places), self.rows):
            yield from lane_factors(self.panels, places[first : first + self.rows])

    def _together(self, tile: LaneTile) -> tuple[int, ...]:
        """Panels that advance at once: one's sums of a narrow tile would wait for each other."""
        waiting = self.rows * tile.vectors < _CHAINS
        return (2, 1) if waiting and 2 * self.rows <= self.isa.registers - 4 else (1,)

    def _panels(
        self,
        tile: LaneTile,
        panel: Expr,
        together: int,
        block: Expr,
        begin: Expr,
        depth: Expr,
        x_base: Expr,
        y_base: Expr,
    ) -> None:
        width, rows = self.isa.vector, self.rows * together
        row = bind(panel * self.rows)
        total = Registers(rows * tile.vectors, width)
        y_at = bind(y_base + row * tile.pitch)

        def cell(r: int, v: int) -> Expr:
            return y_at + (r * tile.pitch + tile.step(v, self.out_features))

        def inside(r: int) -> Expr:
            # A padding row of the last panel reads the last feature's place and is never stored.
            return T.min(row + r, i64(self.out_features) - 1) if self.ragged else row + r

        def from_bias() -> None:
            for r in range(rows):
                start = bind(self.start(inside(r)))
                for v in range(tile.vectors):
                    total[r * tile.vectors + v] = start

        def from_memory() -> None:
            for r in range(rows):
                for v in range(tile.vectors):
                    at = y_base + inside(r) * tile.pitch + tile.step(v, self.out_features)
                    total[r * tile.vectors + v] = load(self.y, at, width)

        choose(self.blocked, block == 0, from_bias, from_memory)
        x_at = bind(x_base + begin * tile.pitch)
        w_at = [place for p in range(together) for place in self.row_places(panel + p, begin)]

        with T.serial(depth) as k:
            self.fetch(w_at, k)
            x = [
                bind(load(self.x, x_at + k * tile.pitch + tile.step(v, self.in_features), width))
                for v in range(tile.vectors)
            ]
            for r, weight in enumerate(self.weights([at + k * self.column for at in w_at])):
                for v in range(tile.vectors):
                    i = r * tile.vectors + v
                    total[i] = total[i] + weight * x[v]

        def put(finish: bool) -> None:
            def row_of(r: int) -> None:
                for v in range(tile.vectors):
                    value = total[r * tile.vectors + v]
                    if finish:
                        value = self.stored(value, cell(r, v))
                    store(self.y, cell(r, v), value, width)

            for r in range(rows):
                if self.ragged:
                    with T.If(row + r < self.out_features), T.Then():
                        row_of(r)
                else:
                    row_of(r)

        last = block == self.blocks - 1
        choose(self.blocked, last, lambda: put(True), lambda: put(False))


class _Emitter(LaneLinear, DenseTiles):
    spec: DenseLinear

    def __init__(self, spec: DenseLinear) -> None:
        rows = spec.layout.rows
        ragged = spec.out_features % rows != 0
        super().__init__(spec.isa, rows, spec.k_block, spec.chunk_panels, ragged)
        self.set_sizes((spec.out_features, spec.in_features), -(-spec.out_features // rows))
        self.spec = spec

    def build(self) -> Any:
        spec, panel_count = self.spec, -(-self.spec.out_features // self.rows)
        with prim_func(spec.name) as result:
            groups = symbol()
            weight = [Tensor("panels", (panel_count, spec.in_features, self.rows))]
            operands = linear_operands(spec, groups, weight, "lanes")
            self.x, (self.panels,), self.bias, self.residual, self.y = operands
            chunks = -(-panel_count // spec.chunk_panels)
            tiled_tasks(spec.isa, groups, chunks, spec.vectors, self.tile)
        return result[0]
