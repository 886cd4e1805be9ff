"""Gate and up projections in lanes, weight in SELL, and the gate between them.

for chunk of the result's features, token tile (parallel):
  sums of the chunk's rows of the gate, and of up     # sell.py, into scratch of the task
  y = activation(gate) * up

The projections' sums, twice as large as the result, never leave the second-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.math import ACTIVATIONS, Vector
from sparsify.codegen.kernels.cpu.sell import SellLinear, SellSums
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    LaneTile,
    Tensor,
    bind,
    load,
    prim_func,
    store,
    symbol,
    tiled_tasks,
)
from sparsify.layouts import LANES, Sell


@dataclass(frozen=True)
class GatedSell:
    """The kernel's specification.

    Attributes:
        features: features of the result; the weight has twice as many rows, those of the gate
            first. Whole sorting windows of the layout.
        activation: what the gate goes through.
        vectors: widest token tile, in vectors.
    """

    isa: Isa
    features: int
    in_features: int
    layout: Sell
    bias: bool
    activation: str
    vectors: int

    def __post_init__(self) -> None:
        if self.features % self.layout.window:
            raise ValueError(
                f"gated sell kernel: {self.features} features are not whole sorting windows of "
                f"{self.layout.window} rows, so a task would not hold gate and up of the same ones"
            )

    @property
    def name(self) -> str:
        return f"{self.projections.name}_gated_{self.activation}"

    @property
    def projections(self) -> SellLinear:
        """The linear before the gate; a task has one window of each half."""
        return SellLinear(
            self.isa,
            2 * self.features,
            self.in_features,
            self.layout,
            Epilogue(bias=self.bias),
            self.vectors,
            self.layout.window // self.layout.rows,
        )

    def build(self) -> Any:
        """A PrimFunc ``(x, starts, outputs, columns, values[, bias], y[.., features])``."""
        return _Gated(self).build()


class _Gated(SellSums):
    def __init__(self, gated: GatedSell) -> None:
        super().__init__(gated.projections)
        self.gated = gated
        self.window = gated.layout.window
        self.sum_features = 2 * self.window

    def build(self) -> Any:
        gated = self.gated
        with prim_func(gated.name) as result:
            lane_groups = symbol()
            (self.y,) = self.declare(lane_groups, Tensor("y", (lane_groups, gated.features, LANES)))
            chunks = gated.features // self.window
            tiled_tasks(gated.isa, lane_groups, chunks, gated.vectors, self._task)
        return result[0]

    def _task(self, tile: LaneTile, index: Expr, chunk: Expr) -> None:
        gated, groups = self.gated, self.spec.chunk_groups
        lane_groups = -(-tile.vectors // gated.isa.vectors_per_group)
        size = lane_groups * self.sum_features * LANES
        self.sums = T.alloc_buffer((size,), "float32", scope="local")
        row = bind(chunk * self.window)
        with T.serial(T.int64(2)) as half:
            first = bind(half * gated.features + row)
            base = bind((half * self.window - first) * LANES)
            self.chunk(tile, index, T.floordiv(first, self.rows), T.int64(groups), base)
        self._open(tile, bind(tile.base(index, gated.features) + row * LANES))

    def _open(self, tile: LaneTile, y_base: Expr) -> None:
        width = self.gated.isa.vector
        with T.serial(T.int64(self.window)) as row:
            at = bind(row * LANES)
            for v in range(tile.vectors):
                gate = at + tile.step(v, self.sum_features)
                up = load(self.sums, gate + self.window * LANES, width)
                opened = ACTIVATIONS[self.gated.activation](
                    Vector(load(self.sums, gate, width), width)
                )
                store(
                    self.y,
                    y_base + at + tile.step(v, self.gated.features),
                    opened.value * up,
                    width,
                )
