"""Linears of experts on tokens in lanes, weights in SELL.

for chunk of a sorting window, expert (parallel):
  for tile of the expert's lane groups:
    sums of the window's rows                   # sell.py; with a gate those of gate and up
    store activation(gate) * up, or activation(sums)

An expert's tokens begin at a lane group of their own, so only its last group may have lanes
without a token. Few tokens take this way as well: with four zeros in five, their weights take as
long to come from memory as to be multiplied by a whole vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.expert_plan import Plan
from sparsify.codegen.kernels.cpu.sell import sell_tensors
from sparsify.codegen.kernels.cpu.sell_gated import GatedTiles
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    LaneTile,
    Tensor,
    arguments,
    bind,
    prim_func,
    splat,
    symbol,
)
from sparsify.layouts import LANES, Sell, Stack


@dataclass(frozen=True)
class SellExperts:
    """The kernel's specification.

    Attributes:
        stack: the weights; with a gate, two matrices an expert.
        x_features: of a token of ``x``, at least as many as the weights have columns.
        gated: ``activation(gate) * up``.
        bias: one is added to the sums.
        vectors: widest token tile, in vectors.
    """

    isa: Isa
    stack: Stack
    x_features: int
    gated: bool
    activation: str
    bias: bool
    vectors: int

    @property
    def layout(self) -> Sell:
        assert isinstance(self.stack.layout, Sell)
        return self.stack.layout

    @property
    def parts(self) -> int:
        return 2 if self.gated else 1

    @property
    def experts(self) -> int:
        return self.stack.count // self.parts

    @property
    def name(self) -> str:
        stack, layout = self.stack, self.layout
        gate, bias = "gated" if self.gated else "plain", "_bias" * self.bias
        return (
            f"sell_experts_{self.isa.name}_{self.experts}x{stack.rows}x{stack.columns}"
            f"of{self.x_features}_r{layout.rows}_k{layout.k_block}_w{layout.window}"
            f"_v{self.vectors}_{gate}_{self.activation}{bias}"
        )

    def build(self) -> Any:
        """A PrimFunc ``(x, plan, starts, outputs, columns, values[, bias], y)``.

        ``x`` is ``[groups, x_features, 16]``, ``y`` ``[groups, padded rows, 16]``.
        """
        return _Emitter(self).build()


class _Emitter(GatedTiles):
    from_memory = True

    def __init__(self, spec: SellExperts) -> None:
        layout, stack = spec.layout, spec.stack
        super().__init__(spec.isa, layout.rows, ragged=False)
        self.spec, self.pitch = spec, stack.pitch
        self.set_sizes(
            (2 * layout.window if spec.gated else stack.pitch, spec.x_features),
            layout.k_block,
            layout.blocks(stack.columns),
            layout.groups(stack.shape[0]),
            layout.window // layout.rows,
        )
        self.activation, self.window = spec.activation, layout.window
        self.y_features = self.distance = stack.pitch

    def build(self) -> Any:
        spec, stack = self.spec, self.spec.stack
        with prim_func(spec.name) as result:
            groups, length = symbol(), symbol()
            self.x, buffer, *packed, self.bias, self.result = arguments(
                Tensor("x", (groups, spec.x_features, LANES)),
                Tensor("plan", (length,), "int32"),
                *sell_tensors(spec.layout, *stack.shape),
                Tensor("bias", (spec.experts, spec.parts * stack.rows)) if spec.bias else None,
                Tensor("y", (groups, stack.pitch, LANES)),
            )
            self.starts, self.outputs, self.columns, self.values = packed
            self.bind_permute_controls()
            plan = Plan(spec.experts, buffer, groups * LANES)
            chunks = stack.pitch // self.window
            with T.parallel(T.int64(chunks * spec.experts)) as task:
                chunk = bind(T.floordiv(task, spec.experts))
                expert = bind(T.floormod(task, spec.experts))
                first = bind(T.floordiv(plan.start(expert), LANES))
                end = bind(T.floordiv(plan.end(expert) + (LANES - 1), LANES))
                self._tiles(expert, chunk, first, end)
        return result[0]

    def _tiles(self, expert: Expr, chunk: Expr, first: Expr, end: Expr) -> None:
        """All tokens of an expert, by tiles of the widest kind and then by narrower ones."""
        per_group = self.isa.vectors_per_group
        vectors, done = self.spec.vectors, first
        while vectors >= per_group:
            groups = vectors // per_group
            tiles = bind(T.floordiv(end - done, groups))
            with T.serial(tiles) as tile:
                self._tile(expert, chunk, bind(done + tile * groups), T.int64(0), vectors)
            done = bind(done + tiles * groups)
            vectors //= 2
        if self.spec.vectors < per_group:
            with T.serial(end - first) as group:
                for part in range(0, per_group, self.spec.vectors):
                    offset = T.int64(part * self.isa.vector)
                    self._tile(expert, chunk, first + group, offset, self.spec.vectors)

    def _tile(self, expert: Expr, chunk: Expr, group: Expr, part: Expr, vectors: int) -> None:
        spec, tile = self.spec, LaneTile(self.isa, vectors)
        matrix = bind(expert * spec.parts)
        whole = bind(matrix * (self.pitch // self.window) + chunk)
        x_base = bind(group * (spec.x_features * LANES) + part)
        y_base = bind(group * (self.pitch * LANES) + part)
        row = bind(chunk * self.window)
        if spec.gated:
            self.both(tile, whole, x_base, bind(y_base + row * LANES))
            return
        self.y = self.result
        self.task(tile, whole, x_base, bind(y_base - matrix * (self.pitch * LANES)))
        Epilogue(activation=spec.activation).activate(
            tile, self.pitch, self.y, None, y_base, row, T.int64(self.window)
        )

    def start(self, row: Expr) -> Expr:
        """Of a row of the whole stack; padding may begin with anything."""
        if self.bias is None:
            return splat(0.0, self.isa.vector)
        rows = self.spec.stack.rows
        matrix = bind(T.floordiv(row, self.pitch))
        inside = T.min(row - matrix * self.pitch, T.int64(rows - 1))
        return splat(self.bias[matrix * rows + inside], self.isa.vector)
