"""Sparse linear for few tokens from SELL: activations are gathered by column.

for chunk of row groups (parallel):
  for K block, group of R rows, token tile:
    for step: acc[rows, :] += values[rows] * gather(x[:], columns[rows])
    add to the outputs of the group's rows
  bias, activation, residual

When a vector is wider than R it takes several steps at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.row_kernel import RowKernel
from sparsify.codegen.kernels.cpu.rows import token_tiles
from sparsify.codegen.kernels.cpu.sell import sell_tensors
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    Tensor,
    bind,
    choose,
    i64,
    intrinsic,
    load,
    prefetch,
    store,
)
from sparsify.layouts import LANES, Sell

_AHEAD = 256
"""Values between a prefetch and its use."""


@dataclass(frozen=True)
class SellRowsLinear:
    """The kernel's specification.

    Attributes:
        tokens: widest token tile, a power of two.
    """

    isa: Isa
    out_features: int
    in_features: int
    layout: Sell
    epilogue: Epilogue
    tokens: int

    @property
    def name(self) -> str:
        layout = self.layout
        return (
            f"sell_rows_{self.isa.name}_{self.out_features}x{self.in_features}_r{layout.rows}"
            f"_k{layout.k_block}_w{layout.window}_t{self.tokens}_{self.epilogue.name}"
        ).rstrip("_")

    def build(self) -> Any:
        """A PrimFunc ``(x, starts, outputs, columns, values[, bias][, residual], y)``."""
        return _Emitter(self).build()


class SellRowTiles:
    """Emits the sums of one group of rows in a K block.

    Attributes:
        rows, k_block, blocks: the layout's, and K blocks of in_features.
        in_features, y_features: features of a token of ``x`` and of ``y``; those of ``y`` begin at
            ``y_first``.
        ragged: the last group may have slots without a row, whose output is -1.
        x, starts, outputs, columns, values, y: the kernel's arguments.
    """

    isa: Isa
    x: Expr
    starts: Expr
    outputs: Expr
    columns: Expr
    values: Expr
    y: Expr
    in_features: Expr | int
    y_features: Expr | int
    y_first: int = 0
    k_block: Expr | int
    blocks: Expr | int

    def set_rows(self, isa: Isa, rows: int, ragged: bool) -> None:
        self.isa, self.rows, self.ragged = isa, rows, ragged
        self.steps = isa.vector // rows if isa.vector % rows == 0 else 1
        """Steps that one vector takes."""
        self.narrow = math.gcd(rows, isa.vector)
        """Lanes of a vector that takes a part of one step, or a whole one."""

    def entry(self, block: Expr, entry: Expr, token: Expr, count: int) -> None:
        begin = bind(i64(self.starts[entry]))
        steps = bind(i64(self.starts[entry + 1]) - begin)
        k_block = block * self.k_block
        x_at = [bind((token + t) * self.in_features + k_block) for t in range(count)]
        wide = T.floordiv(steps, self.steps)
        parts = self.rows // self.narrow
        single = Registers(parts * count, self.narrow)
        single.clear()
        if self.steps > 1:
            several = Registers(count, self.isa.vector)
            several.clear()
            with T.serial(wide) as i:
                self._multiply(several, bind((begin + i * self.steps) * self.rows), x_at)
            with T.serial(steps - wide * self.steps) as i:
                slot = bind((begin + wide * self.steps + i) * self.rows)
                self._multiply(single, slot, x_at)
            for t in range(count):
                for s in range(self.steps):
                    lanes = [s * self.rows + lane for lane in range(self.rows)]
                    single[t] = single[t] + T.Shuffle([several[t]], lanes)
        else:
            with T.serial(steps) as i:
                slot = bind((begin + i) * self.rows)
                for part in range(parts):
                    at = slot + part * self.narrow
                    self._multiply(single, at, x_at, part * count)
        self._store(block, entry, single, token, count)

    def _multiply(self, total: Registers, slot: Expr, x_at: list[Expr], first: int = 0) -> None:
        """Adds a vector of slots for each token, to the registers from ``first``."""
        width = total.width
        prefetch(self.values, slot + _AHEAD)
        prefetch(self.columns, T.floordiv(slot + _AHEAD, 4))
        values = bind(load(self.values, slot, width))
        packed = load(self.columns, T.floordiv(slot, 4), width // 4)
        columns = T.Cast(f"int32x{width}", T.reinterpret(f"uint16x{width}", bind(packed)))
        columns = bind(T.shift_right(columns, T.Broadcast(T.int32(LANES.bit_length() - 1), width)))
        for t, at in enumerate(x_at):
            x = gather(self.isa, self.x, at, columns, width)
            total[first + t] = total[first + t] + values * x

    def _store(self, block: Expr, entry: Expr, total: Registers, token: Expr, count: int) -> None:
        rows = [bind(i64(self.outputs[entry * self.rows + r])) for r in range(self.rows)]
        parts = self.rows // self.narrow

        def put(add: bool) -> None:
            for t in range(count):
                base = bind((token + t) * self.y_features + self.y_first)
                for r, row in enumerate(rows):
                    part, lane = divmod(r, self.narrow)
                    value = total.lane((part * count + t) * self.narrow + lane)
                    offset = base + row
                    if self.ragged:
                        with T.If(row >= 0), T.Then():
                            store(self.y, offset, self.y[offset] + value if add else value, 1)
                    else:
                        store(self.y, offset, self.y[offset] + value if add else value, 1)

        assert parts * count == len(total)
        choose(
            not isinstance(self.blocks, int) or self.blocks > 1,
            block == 0,
            lambda: put(False),
            lambda: put(True),
        )


class _Emitter(SellRowTiles, RowKernel):
    spec: SellRowsLinear

    def __init__(self, spec: SellRowsLinear) -> None:
        RowKernel.__init__(self, spec, spec.layout.window)
        layout = spec.layout
        self.set_rows(spec.isa, layout.rows, spec.out_features % layout.rows != 0)
        self.in_features, self.y_features = spec.in_features, spec.out_features
        self.k_block, self.blocks = layout.k_block, layout.blocks(spec.in_features)
        self.groups = layout.groups(spec.out_features)

    def weight(self) -> tuple[Tensor, ...]:
        return sell_tensors(self.spec.layout, self.spec.out_features, self.spec.in_features)

    def take(self, *packed: Expr) -> None:
        self.starts, self.outputs, self.columns, self.values = packed

    def sums(self, first: Expr, units: Expr, row: Expr, rows: Expr) -> None:
        """K block by K block, whose activations stay in cache."""
        group = bind(T.floordiv(row, self.rows))
        groups = bind(T.floordiv(rows + (self.rows - 1), self.rows))
        with T.serial(i64(self.blocks)) as block, T.serial(groups) as i:
            entry = bind(block * self.groups + group + i)
            token_tiles(
                self.tokens,
                self.spec.tokens,
                lambda token, count: self.entry(block, entry, token, count),
            )


def gather(isa: Isa, buffer: Expr, base: Expr, index: Expr, width: int) -> Expr:
    """``buffer[base + index[lane]]`` for each lane of an int32 vector."""
    dtype = f"float32x{width}"
    nothing = T.Broadcast(T.float32(0), width)
    place = T.address_of(buffer[base])
    if isa.name == "avx512" and width == 16:
        every = T.reinterpret("uint1x16", T.uint16(0xFFFF))
        name = "llvm.x86.avx512.mask.gather.dps.512"
        return bind(intrinsic(dtype, name, nothing, place, index, every, T.int32(4)))
    if isa.gathers and width in (4, 8):
        every = T.reinterpret(dtype, T.Broadcast(T.int32(-1), width))
        name = f"llvm.x86.avx2.gather.d.ps{'.256' if width == 8 else ''}"
        return bind(intrinsic(dtype, name, nothing, place, index, every, T.int8(4)))
    lanes = [buffer[base + i64(T.Shuffle([index], [lane]))] for lane in range(width)]
    return bind(T.Shuffle(lanes, list(range(width))))
