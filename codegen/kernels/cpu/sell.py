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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.lane_linear import LaneLinear, LaneTiles
from sparsify.codegen.kernels.cpu.neighbours import load_tile, neighbour_loads
from sparsify.codegen.kernels.cpu.operands import linear_operands
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    LaneTile,
    Registers,
    Tensor,
    bind,
    choose,
    i64,
    intrinsic,
    lane_factors,
    load,
    prefetch,
    prim_func,
    splat,
    store,
    symbol,
    tiled_tasks,
)
from sparsify.layouts import LANES, Sell

_AHEAD = 1024
"""Values between a prefetch and its use."""


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


class SellTiles(LaneTiles):
    """Emits the loops over K blocks, groups and steps of one task.

    Attributes:
        rows, k_block: the layout's.
        blocks, groups: K blocks of in_features, groups of out_features.
        chunk_groups: row groups of one task.
        in_features, out_features: features of ``x`` and of ``y``.
        ragged: the last group may have slots without a row, whose output is -1.
        from_memory: weights come from there: they are fetched ahead.
        x, starts, outputs, columns, values, y: the kernel's arguments, to be set before `task`.
    """

    from_memory: bool = False
    starts: Expr
    outputs: Expr
    columns: Expr
    values: Expr

    def __init__(self, isa: Isa, rows: int, ragged: bool) -> None:
        self.isa, self.rows, self.ragged = isa, rows, ragged

    def set_sizes(
        self,
        features: tuple[Expr | int, Expr | int],
        k_block: Expr | int,
        blocks: Expr | int,
        groups: Expr | int,
        chunk_groups: Expr | int,
    ) -> None:
        """Sizes, of which any may be known only at run time; features are (out, in)."""
        self.out_features, self.in_features = features
        self.k_block, self.blocks, self.groups = k_block, blocks, groups
        self.chunk_groups = chunk_groups
        self.blocked = not isinstance(blocks, int) or blocks > 1

    def bind_permute_controls(self) -> None:
        """Called once, ahead of the tasks."""
        # A constant control would let LLVM fold the permute back into a broadcast load.
        zero = self.starts[0]
        self.controls = [
            bind(T.Broadcast(zero + lane, self.isa.vector))
            for lane in range(self.isa.permuted_of_four)
        ]

    def task(self, tile: LaneTile, chunk: Expr, x_base: Expr, y_base: Expr) -> tuple[Expr, Expr]:
        """All sums of a chunk of rows and a tile of tokens; its first group and how many.

        The bases are the offsets of the tile's first vector in ``x`` and ``y``.
        """
        first = bind(chunk * self.chunk_groups)
        groups = bind(T.min(i64(self.chunk_groups), i64(self.groups) - first))
        with T.serial(i64(self.blocks)) as block:
            x_block = bind(x_base + block * (self.k_block * tile.pitch))
            with T.serial(groups) as group:
                entry = bind(block * self.groups + first + group)
                self._group(tile, entry, block, x_block, y_base)
        return first, groups

    def _group(self, tile: LaneTile, entry: Expr, block: Expr, x_block: Expr, y_base: Expr) -> None:
        begin = bind(i64(self.starts[entry]))
        steps = bind(i64(self.starts[entry + 1]) - begin)
        row = [bind(i64(self.outputs[entry * self.rows + r])) for r in range(self.rows)]
        at = [bind(y_base + row[r] * tile.pitch) for r in range(self.rows)]
        total = Registers(self.rows * tile.vectors, self.isa.vector)
        self._start(tile, total, block, row, at)
        together = self.isa.steps_together
        with neighbour_loads(self.isa), T.serial(T.floordiv(steps, together)) as run:
            for i in range(together):
                slot = bind((begin + (run * together + i)) * self.rows)
                self._step(tile, total, slot, x_block)
        if together > 1:
            single = bind(T.floormod(steps, together))
            with neighbour_loads(self.isa), T.serial(single) as step:
                slot = bind((begin + (steps - single + step)) * self.rows)
                self._step(tile, total, slot, x_block)
        self._finish(tile, total, block, row, at)

    def _start(
        self, tile: LaneTile, total: Registers, block: Expr, row: list[Expr], at: list[Expr]
    ) -> None:
        def from_bias() -> None:
            for r in range(self.rows):
                inside = T.max(row[r], T.int64(0)) if self.ragged else row[r]
                begin = bind(self.start(inside))
                for v in range(tile.vectors):
                    total[r * tile.vectors + v] = begin

        def from_memory() -> None:
            for r in range(self.rows):
                for v in range(tile.vectors):
                    offset = at[r] + tile.step(v, self.out_features)
                    if self.ragged:
                        offset = T.max(offset, T.int64(0))
                    total[r * tile.vectors + v] = load(self.y, offset, self.isa.vector)

        choose(self.blocked, block == 0, from_bias, from_memory)

    def _step(self, tile: LaneTile, total: Registers, slot: Expr, x_block: Expr) -> None:
        if self.from_memory:
            prefetch(self.values, slot + _AHEAD, near=False)
            prefetch(self.columns, T.floordiv(slot + _AHEAD, 4), near=False)
        for quad in range(0, self.rows, 4):
            columns = self._columns(tile, slot + quad, x_block)
            weights = self._weights(slot + quad)
            for r, column in enumerate(columns):
                for v, x in enumerate(column):
                    i = (quad + r) * tile.vectors + v
                    total[i] = total[i] + weights[r] * x

    def _columns(self, tile: LaneTile, slot: Expr, x_block: Expr) -> Iterator[list[Expr]]:
        """The activations of four neighbouring nonzeros, a vector for each of the tile."""
        places = self._by_words if self._words_do(tile) else self._by_fours
        return (
            load_tile(self.isa, buffer, bind(at), tile, self.in_features)
            for buffer, at in places(tile, slot, x_block)
        )

    def _by_fours(self, tile: LaneTile, slot: Expr, x_block: Expr) -> Iterator[tuple[Expr, Expr]]:
        packed = bind(self.columns[T.floordiv(slot, 4)])
        return ((self.x, x_block + _column(packed, r, tile.pitch)) for r in range(4))

    def _words_do(self, tile: LaneTile) -> bool:
        """Whether columns are offsets of less than 2 ** 14 that need no scaling."""
        small = isinstance(self.k_block, int) and self.k_block * LANES <= 1 << 14
        return self.isa.shifted_operands and small and tile.pitch == LANES

    def _by_words(self, tile: LaneTile, slot: Expr, x_block: Expr) -> Iterator[tuple[Expr, Expr]]:
        """Two columns a word: an addition masks and scales the lower, or shifts the upper.

        The word shifted by 14 is the upper column in bytes, since the lower has no such bits.
        """
        words = T.decl_buffer((self.columns.shape[0] * 2,), "uint32", data=self.columns.data)
        byte = T.decl_buffer((self.x.shape[0] * 4,), "uint8", data=self.x.data)
        for pair in range(2):
            word = bind(words[T.floordiv(slot, 2) + pair])
            yield self.x, x_block + T.Cast("int64", T.bitwise_and(word, T.uint32(0xFFFF)))
            yield byte, x_block * 4 + T.shift_right(T.Cast("int64", word), T.int64(14))

    def _weights(self, slot: Expr) -> list[Expr]:
        """Four neighbouring values, each spread over a vector."""
        width, permuted = self.isa.vector, len(self.controls)
        if width == 4:
            return lane_factors(self.values, [slot + r for r in range(4)])
        weights = []
        if permuted:
            quad = load(self.values, slot, 4)
            spread = bind(T.Shuffle([quad] * (width // 4), list(range(4)) * (width // 4)))
            name = f"llvm.x86.avx512.vpermilvar.ps.{32 * width}"
            weights = [bind(intrinsic(f"float32x{width}", name, spread, c)) for c in self.controls]
        broadcast = [bind(splat(self.values[slot + r], width)) for r in range(permuted, 4)]
        return weights + broadcast

    def _finish(
        self, tile: LaneTile, total: Registers, block: Expr, row: list[Expr], at: list[Expr]
    ) -> None:
        width = self.isa.vector
        cells = [(r, v) for r in range(self.rows) for v in range(tile.vectors)]
        offsets = [at[r] + tile.step(v, self.out_features) for r, v in cells]
        sums = [total[r * tile.vectors + v] for r, v in cells]

        def put(values: list[Expr]) -> None:
            for (r, _), offset, value in zip(cells, offsets, values, strict=True):
                if self.ragged:
                    with T.If(row[r] >= 0), T.Then():
                        store(self.y, offset, value, width)
                else:
                    store(self.y, offset, value, width)

        def complete() -> None:
            put([self.stored(value, offset) for value, offset in zip(sums, offsets, strict=True)])

        choose(self.blocked, block == self.blocks - 1, complete, lambda: put(sums))


def _column(packed: Expr, index: int, pitch: int) -> Expr:
    """Of four columns times 16, the one at an index, times ``pitch``: a shift and a mask."""
    shift = 16 * index - pitch.bit_length() + LANES.bit_length()
    moved = (
        T.shift_right(packed, T.int64(shift))
        if shift >= 0
        else (T.shift_left(packed, T.int64(-shift)))
    )
    return T.bitwise_and(moved, T.int64(0xFFFF * pitch // LANES))


def sell_tensors(layout: Sell, out_features: int, in_features: int) -> tuple[Tensor, ...]:
    """The packed tensors as parameters."""
    count = layout.blocks(in_features) * layout.groups(out_features)
    return (
        Tensor("starts", (count + 1,), "int32"),
        Tensor("outputs", (count * layout.rows,), "int32"),
        Tensor("columns", (symbol(),), "int64"),
        Tensor("values", (symbol(),)),
    )


class _Emitter(LaneLinear, SellTiles):
    spec: SellLinear

    def __init__(self, spec: SellLinear) -> None:
        layout, shape = spec.layout, (spec.out_features, spec.in_features)
        super().__init__(spec.isa, layout.rows, spec.out_features % layout.rows != 0)
        blocks, groups = layout.blocks(spec.in_features), layout.groups(spec.out_features)
        self.set_sizes(shape, layout.k_block, blocks, groups, spec.chunk_groups)
        self.spec = spec

    def build(self) -> Any:
        spec = self.spec
        with prim_func(spec.name) as result:
            lane_groups = symbol()
            weight = sell_tensors(spec.layout, spec.out_features, spec.in_features)
            operands = linear_operands(spec, lane_groups, weight, "lanes")
            self.x, packed, self.bias, self.residual, self.y = operands
            self.starts, self.outputs, self.columns, self.values = packed
            self.bind_permute_controls()
            chunks = -(-spec.layout.groups(spec.out_features) // spec.chunk_groups)
            tiled_tasks(spec.isa, lane_groups, chunks, spec.vectors, self.tile)
        return result[0]
