"""Sparse linear in lanes, weight in SELL: one broadcast weight times contiguous tokens.

for chunk of row groups, token tile (parallel):
  for K block:                              # its activations stay in the first-level cache
    for group of R rows:                    # R x vectors accumulators in registers
      for step: R nonzeros, one of each row:
        acc[r, :] += value[r] * x[column[r], tokens]
      store
  activation, residual
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    LaneTile,
    Registers,
    Tensor,
    arguments,
    bind,
    choose,
    i64,
    intrinsic,
    load,
    prim_func,
    splat,
    store,
    symbol,
    tiled_tasks,
)
from sparsify.layouts import LANES, Sell


@dataclass(frozen=True)
class SellLinear:
    """The kernel's specification.

    Attributes:
        out_features, in_features: the weight's shape.
        layout: how it is packed.
        vectors: widest token tile, in vectors.
        chunk_groups: row groups of one parallel task.
    """

    isa: Isa
    out_features: int
    in_features: int
    layout: Sell
    epilogue: Epilogue
    vectors: int
    chunk_groups: int

    def __post_init__(self) -> None:
        if (self.chunk_groups * self.layout.rows) % self.layout.window:
            raise ValueError(
                f"sell kernel: chunks of {self.chunk_groups * self.layout.rows} rows would split "
                f"a sorting window of {self.layout.window} rows between tasks"
            )

    @property
    def name(self) -> str:
        layout = self.layout
        return (
            f"sell_{self.isa.name}_{self.out_features}x{self.in_features}_r{layout.rows}"
            f"_k{layout.k_block}_w{layout.window}_v{self.vectors}_c{self.chunk_groups}"
            f"_{self.epilogue.name}"
        ).rstrip("_")

    def build(self) -> Any:
        """A PrimFunc ``(x, starts, outputs, columns, values[, bias][, residual], y)``."""
        return _Emitter(self).build()


class _Emitter:
    def __init__(self, spec: SellLinear) -> None:
        self.spec = spec
        self.rows = spec.layout.rows
        self.blocks = spec.layout.blocks(spec.in_features)
        self.groups = spec.layout.groups(spec.out_features)
        self.ragged = spec.out_features % self.rows != 0

    def build(self) -> Any:
        spec = self.spec
        with prim_func(spec.name) as result:
            lane_groups, stream, tail = symbol(), symbol(), symbol()
            count = self.blocks * self.groups
            features = (lane_groups, spec.out_features, LANES)
            self.x, self.starts, self.outputs, self.columns, self.values, *rest = arguments(
                Tensor("x", (lane_groups, spec.in_features, LANES)),
                Tensor("starts", (count + 1,), "int32"),
                Tensor("outputs", (count * self.rows,), "int32"),
                Tensor("columns", (stream,), "int64"),
                Tensor("values", (tail,)),
                Tensor("bias", (spec.out_features,)) if spec.epilogue.bias else None,
                Tensor("residual", features) if spec.epilogue.residual else None,
                Tensor("y", features),
            )
            self.bias, self.residual, self.y = rest
            self._bind_permute_controls()
            chunks = -(-self.groups // spec.chunk_groups)
            tiled_tasks(spec.isa, lane_groups, chunks, spec.vectors, self._task)
        return result[0]

    def _bind_permute_controls(self) -> None:
        # A constant control would let LLVM fold the permute back into a broadcast load.
        zero = self.starts[0]
        width = self.spec.isa.vector
        self.controls = [
            bind(T.Broadcast(zero + lane, width)) for lane in range(self.spec.isa.permuted_of_four)
        ]

    def _task(self, tile: LaneTile, index: Expr, chunk: Expr) -> None:
        spec = self.spec
        x_base = bind(tile.base(index, spec.in_features))
        y_base = bind(tile.base(index, spec.out_features))
        first = bind(chunk * spec.chunk_groups)
        groups = bind(T.min(T.int64(spec.chunk_groups), T.int64(self.groups) - first))
        with T.serial(T.int64(self.blocks)) as block:
            x_block = bind(x_base + block * (spec.layout.k_block * LANES))
            with T.serial(groups) as group:
                entry = bind(block * self.groups + first + group)
                self._group(tile, entry, block, x_block, y_base)
        row = bind(first * self.rows)
        rows = bind(T.min(groups * self.rows, T.int64(spec.out_features) - row))
        spec.epilogue.activate(tile, spec.out_features, self.y, self.residual, y_base, row, rows)

    def _group(self, tile: LaneTile, entry: Expr, block: Expr, x_block: Expr, y_base: Expr) -> None:
        features = self.spec.out_features
        begin = bind(i64(self.starts[entry]))
        steps = bind(i64(self.starts[entry + 1]) - begin)
        row = [bind(i64(self.outputs[entry * self.rows + r])) for r in range(self.rows)]
        at = [bind(y_base + row[r] * LANES) for r in range(self.rows)]
        total = Registers(self.rows * tile.vectors, self.spec.isa.vector)
        self._start(tile, total, block, row, at)
        with T.serial(steps) as step:
            self._step(tile, total, bind((begin + step) * self.rows), x_block)
        self._finish(tile, total, block, row, at, features)

    def _start(
        self, tile: LaneTile, total: Registers, block: Expr, row: list[Expr], at: list[Expr]
    ) -> None:
        width, features = self.spec.isa.vector, self.spec.out_features

        def from_bias() -> None:
            for r in range(self.rows):
                inside = T.max(row[r], T.int64(0)) if self.ragged else row[r]
                begin = bind(self.spec.epilogue.start(self.bias, inside, width))
                for v in range(tile.vectors):
                    total[r * tile.vectors + v] = begin

        def from_memory() -> None:
            for r in range(self.rows):
                for v in range(tile.vectors):
                    offset = at[r] + tile.step(v, features)
                    if self.ragged:
                        offset = T.max(offset, T.int64(0))
                    total[r * tile.vectors + v] = load(self.y, offset, width)

        choose(self.blocks > 1, block == 0, from_bias, from_memory)

    def _step(self, tile: LaneTile, total: Registers, slot: Expr, x_block: Expr) -> None:
        width, features = self.spec.isa.vector, self.spec.in_features
        for quad in range(0, self.rows, 4):
            packed = bind(self.columns[T.floordiv(slot, 4) + quad // 4])
            weights = self._weights(slot + quad)
            for r in range(4):
                column = T.bitwise_and(T.shift_right(packed, T.int64(16 * r)), T.int64(0xFFFF))
                x_at = bind(x_block + column)
                for v in range(tile.vectors):
                    i = (quad + r) * tile.vectors + v
                    x = load(self.x, x_at + tile.step(v, features), width)
                    total[i] = total[i] + weights[r] * x

    def _weights(self, slot: Expr) -> list[Expr]:
        """Four neighbouring values, each spread over a vector."""
        width, permuted = self.spec.isa.vector, len(self.controls)
        if width == 4:  # multiply-adds of 128-bit vectors take one lane of a vector as a factor
            quad = bind(load(self.values, slot, 4))
            return [bind(T.Shuffle([quad], [r] * 4)) for r in range(4)]
        weights = []
        if permuted:
            quad = load(self.values, slot, 4)
            spread = bind(T.Shuffle([quad] * (width // 4), list(range(4)) * (width // 4)))
            name = f"llvm.x86.avx512.vpermilvar.ps.{32 * width}"
            weights = [bind(intrinsic(f"float32x{width}", name, spread, c)) for c in self.controls]
        broadcast = [bind(splat(self.values[slot + r], width)) for r in range(permuted, 4)]
        return weights + broadcast

    def _finish(
        self,
        tile: LaneTile,
        total: Registers,
        block: Expr,
        row: list[Expr],
        at: list[Expr],
        features: int,
    ) -> None:
        width = self.spec.isa.vector

        cells = [(r, v) for r in range(self.rows) for v in range(tile.vectors)]
        offsets = [at[r] + tile.step(v, features) for r, v in cells]
        sums = [total[r * tile.vectors + v] for r, v in cells]

        def put(values: list[Expr]) -> None:
            for (r, _), offset, value in zip(cells, offsets, values, strict=True):
                if self.ragged:
                    with T.If(row[r] >= 0), T.Then():
                        store(self.y, offset, value, width)
                else:
                    store(self.y, offset, value, width)

        def complete() -> None:
            stored = self.spec.epilogue.stored
            pairs = zip(sums, offsets, strict=True)
            put([stored(value, self.residual, offset, width) for value, offset in pairs])

        last = block == self.blocks - 1
        choose(self.blocks > 1, last, complete, lambda: put(sums))
