"""Sums of one token from SELL: activations are gathered by column.

for step: acc[rows] += values[rows] * gather(x, columns[rows])

When a vector is wider than R it takes several steps at once.
"""

from __future__ import annotations

import math

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    bind,
    ceil_div,
    choose,
    i64,
    intrinsic,
    load,
    prefetch,
    store,
)
from sparsify.layouts import LANES

_AHEAD = 256
"""Values between a prefetch and its use."""


class GatheredSums:
    """Emits the sums of runs of rows for one token.

    Attributes:
        rows, k_block: the layout's.
        blocks, groups: K blocks of in_features, groups of out_features.
        y_first: where the features of ``y`` begin.
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
    k_block: Expr | int
    blocks: Expr | int
    groups: Expr | int

    def __init__(self, isa: Isa, rows: int, ragged: bool, y_first: int = 0) -> None:
        self.isa, self.rows, self.ragged, self.y_first = isa, rows, ragged, y_first
        self.steps = isa.vector // rows if isa.vector % rows == 0 else 1
        """Steps that one vector takes."""
        self.narrow = math.gcd(rows, isa.vector)
        """Lanes of a vector that takes a part of one step, or a whole one."""

    def run(self, row: Expr, rows: Expr) -> None:
        """Stores the sums of whole groups, K block by K block, whose activations stay in cache."""
        group, groups = bind(T.floordiv(row, self.rows)), ceil_div(rows, self.rows)
        with T.serial(i64(self.blocks)) as block, T.serial(groups) as i:
            self._group(block, bind(block * self.groups + group + i))

    def _group(self, block: Expr, entry: Expr) -> None:
        begin = bind(i64(self.starts[entry]))
        steps = bind(i64(self.starts[entry + 1]) - begin)
        x_at = bind(block * self.k_block)
        wide = T.floordiv(steps, self.steps)
        parts = self.rows // self.narrow
        single = Registers(parts, self.narrow)
        single.clear()
        if self.steps > 1:
            several = Registers(1, self.isa.vector)
            several.clear()
            with T.serial(wide) as i:
                self._multiply(several, bind((begin + i * self.steps) * self.rows), x_at)
            with T.serial(steps - wide * self.steps) as i:
                slot = bind((begin + wide * self.steps + i) * self.rows)
                self._multiply(single, slot, x_at)
            for s in range(self.steps):
                lanes = [s * self.rows + lane for lane in range(self.rows)]
                single[0] = single[0] + T.Shuffle([several[0]], lanes)
        else:
            with T.serial(steps) as i:
                slot = bind((begin + i) * self.rows)
                for part in range(parts):
                    at = slot + part * self.narrow
                    self._multiply(single, at, x_at, part)
        self._store(block, entry, single)

    def _multiply(self, total: Registers, slot: Expr, x_at: Expr, part: int = 0) -> None:
        """Adds a vector of slots."""
        width = total.width
        prefetch(self.values, slot + _AHEAD)
        prefetch(self.columns, T.floordiv(slot + _AHEAD, 4))
        values = bind(load(self.values, slot, width))
        packed = load(self.columns, T.floordiv(slot, 4), width // 4)
        columns = T.Cast(f"int32x{width}", T.reinterpret(f"uint16x{width}", bind(packed)))
        columns = bind(T.shift_right(columns, T.Broadcast(T.int32(LANES.bit_length() - 1), width)))
        total[part] = total[part] + values * gather(self.isa, self.x, x_at, columns, width)

    def _store(self, block: Expr, entry: Expr, total: Registers) -> None:
        rows = [bind(i64(self.outputs[entry * self.rows + r])) for r in range(self.rows)]

        def put(add: bool) -> None:
            for r, row in enumerate(rows):
                value, offset = total.lane(r), self.y_first + row
                if self.ragged:
                    with T.If(row >= 0), T.Then():
                        store(self.y, offset, self.y[offset] + value if add else value, 1)
                else:
                    store(self.y, offset, self.y[offset] + value if add else value, 1)

        choose(
            not isinstance(self.blocks, int) or self.blocks > 1,
            block == 0,
            lambda: put(False),
            lambda: put(True),
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
