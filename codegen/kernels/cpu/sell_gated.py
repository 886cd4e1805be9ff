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
from sparsify.codegen.kernels.cpu.math import ACTIVATIONS, Vector
from sparsify.codegen.kernels.cpu.sell import SellTiles, sell_tensors
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    LaneTile,
    Tensor,
    arguments,
    bind,
    load,
    prim_func,
    splat,
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
        layout, bias = self.layout, "_bias" * self.bias
        return (
            f"gated_sell_{self.isa.name}_{self.features}x{self.in_features}_r{layout.rows}"
            f"_k{layout.k_block}_w{layout.window}_v{self.vectors}{bias}_{self.activation}"
        )

    def build(self) -> Any:
        """A PrimFunc ``(x, starts, outputs, columns, values[, bias], y[.., features])``."""
        return _Gated(self).build()


class GatedTiles(SellTiles):
    """Tasks that compute a sorting window of the gate and the same one of up, and the gate.

    Attributes:
        activation: what the gate goes through.
        window: rows of a sorting window.
        result, y_features: where results are stored, and how many features they have.
        distance: rows of the weight from a feature of the gate to the same one of up.
    """

    activation: str
    window: int
    result: Expr
    y_features: int
    distance: int

    def both(self, tile: LaneTile, chunk: Expr, x_base: Expr, y_base: Expr) -> None:
        """A window of results: ``chunk`` is the gate's, ``y_base`` where the first is stored."""
        window = self.window
        lane_groups = -(-tile.vectors // self.isa.vectors_per_group)
        self.y = T.alloc_buffer((lane_groups * 2 * window * LANES,), "float32", scope="local")
        with T.serial(T.int64(2)) as half:
            base = bind((half * (window - self.distance) - chunk * window) * LANES)
            self.task(tile, half * (self.distance // window) + chunk, x_base, base)
        self._open(tile, y_base)

    def _open(self, tile: LaneTile, base: Expr) -> None:
        width = self.isa.vector
        with T.serial(T.int64(self.window)) as row:
            at = bind(row * LANES)
            for v in range(tile.vectors):
                sums = at + tile.step(v, self.out_features)
                gate = Vector(load(self.y, sums, width), width, self.isa)
                up = load(self.y, sums + self.window * LANES, width)
                opened = ACTIVATIONS[self.activation](gate).value
                store(self.result, base + at + tile.step(v, self.y_features), opened * up, width)

    def stored(self, total: Expr, offset: Expr) -> Expr:
        return total


class _Gated(GatedTiles):
    def __init__(self, gated: GatedSell) -> None:
        layout, self.gated = gated.layout, gated
        super().__init__(gated.isa, layout.rows, ragged=False)
        self.set_sizes(
            (2 * layout.window, gated.in_features),
            layout.k_block,
            layout.blocks(gated.in_features),
            layout.groups(2 * gated.features),
            layout.window // layout.rows,
        )
        self.activation, self.window = gated.activation, layout.window
        self.y_features = self.distance = gated.features

    def build(self) -> Any:
        gated = self.gated
        with prim_func(gated.name) as result:
            lane_groups = symbol()
            self.x, *packed, self.bias, self.result = arguments(
                Tensor("x", (lane_groups, gated.in_features, LANES)),
                *sell_tensors(gated.layout, 2 * gated.features, gated.in_features),
                Tensor("bias", (2 * gated.features,)) if gated.bias else None,
                Tensor("y", (lane_groups, gated.features, LANES)),
            )
            self.starts, self.outputs, self.columns, self.values = packed
            self.bind_permute_controls()
            chunks = gated.features // gated.layout.window
            tiled_tasks(gated.isa, lane_groups, chunks, gated.vectors, self._tile)
        return result[0]

    def _tile(self, tile: LaneTile, index: Expr, chunk: Expr) -> None:
        gated = self.gated
        x_base = bind(tile.base(index, gated.in_features))
        row = bind(chunk * self.window)
        self.both(tile, chunk, x_base, bind(tile.base(index, gated.features) + row * LANES))

    def start(self, row: Expr) -> Expr:
        return splat(self.bias[row] if self.bias is not None else 0.0, self.isa.vector)
