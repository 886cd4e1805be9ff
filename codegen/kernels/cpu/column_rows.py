"""Linear for few tokens that reads the columns of those inputs alone that are not zero.

list the inputs that are not zero in all tokens
for panel of R outputs (parallel):
  for part of its outputs, token tile:        # sums stay in the first-level cache
    for eight columns of the list:
      for vector of outputs: sums[:, vector] += x[:, columns] * panel[columns, vector]
    store
  bias, activation, residual

Lanes of a vector run along out_features, so nothing is summed over lanes. Meanwhile the next eight
columns are fetched into the second-level cache: eight streams of some kilobytes keep memory busier
than rows do, and without a zero this is the fastest of the dense kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.active_set import ActiveSet
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.row_kernel import RowKernel
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Tensor,
    along,
    bind,
    load,
    prefetch,
    splat,
    store,
)
from sparsify.layouts import DenseColumns

TOGETHER = 8
"""Columns that share a load and a store of sums."""

_SUMS = 8192
"""Sums that the first-level cache keeps beside the columns."""

_SPREAD = 32
"""Floats between the sums of two tokens, so that they do not meet in one set of a cache."""


@dataclass(frozen=True)
class ColumnsLinear:
    """The kernel's specification.

    Attributes:
        tokens: widest token tile, a power of two.
    """

    isa: Isa
    out_features: int
    in_features: int
    layout: DenseColumns
    epilogue: Epilogue
    tokens: int

    @property
    def name(self) -> str:
        layout = self.layout
        return (
            f"columns_{self.isa.name}_{self.out_features}x{self.in_features}_r{layout.rows}"
            f"_b{layout.value_bits}_t{self.tokens}_{self.epilogue.name}"
        ).rstrip("_")

    def build(self) -> Any:
        """A PrimFunc ``(x, panels[, bias][, residual], y)``."""
        return _Emitter(self).build()


class ColumnTiles:
    """Emits the sums of some neighbouring outputs.

    Attributes:
        halves: weights are the upper halves of fp32, in pairs.
        rows: from one column of ``panels`` to the next.
        in_features, y_features: features of a token of ``x`` and of ``y``; those of ``y`` begin at
            ``y_first``.
        active: the inputs that are not zero.
        x, panels, y: the kernel's arguments.
    """

    isa: Isa
    halves: bool = False
    rows: Expr | int
    in_features: Expr | int
    y_features: Expr | int
    y_first: int = 0
    active: ActiveSet
    x: Expr
    panels: Expr
    y: Expr

    @property
    def step(self) -> int:
        """Outputs that one iteration adds to."""
        return 2 * self.isa.vector if self.halves else self.isa.vector

    def list_active(self, tokens: Expr, known: bool) -> None:
        """Finds the inputs that are not zero."""
        self.active = ActiveSet(self.isa, self.x, tokens, self.in_features, known, TOGETHER)
        self.active.wrap(TOGETHER)

    def part(
        self,
        begin: Expr,
        following: Expr,
        outputs: Expr,
        most: int,
        place: tuple[Expr, Expr],
        token: Expr,
        count: int,
    ) -> None:
        """The sums of some outputs.

        Args:
            begin, following: where the first column of these outputs lies in ``panels``, and that
                of those which come next.
            outputs, most: how many, and at most.
            place: the first one's, and how many there are room for in ``y``.
        """
        pitch = most + _SPREAD
        self.sums = T.alloc_buffer((count * pitch,), "float32", scope="local")
        for t in range(count):
            self._clear(t * pitch, most)
        x_at = [bind((token + t) * self.in_features) for t in range(count)]
        whole = bind(T.floordiv(self.active.count, TOGETHER))
        with T.serial(whole) as group:
            first = bind(group * TOGETHER)
            # What is behind the last of the list are the first ones.
            after = first + TOGETHER < self.active.count
            ahead = bind(T.if_then_else(after, begin, following))
            self._columns(begin, ahead, first, TOGETHER, outputs, x_at, pitch)
        with T.serial(self.active.count - whole * TOGETHER) as rest:
            self._columns(begin, None, bind(whole * TOGETHER + rest), 1, outputs, x_at, pitch)
        row, room = place
        left = bind(T.min(outputs, room))
        for t in range(count):
            y_at = bind((token + t) * self.y_features + self.y_first + row)
            self._put(y_at, t * pitch, left)

    def _clear(self, first: int, count: int) -> None:
        def clear(at: Expr, width: int) -> None:
            store(self.sums, first + at, splat(0.0, width), width)

        along(count, self.isa.vector, clear)

    def _put(self, y_at: Expr, sums_at: int, count: Expr) -> None:
        def put(at: Expr, width: int) -> None:
            store(self.y, y_at + at, load(self.sums, sums_at + at, width), width)

        along(count, self.isa.vector, put)

    def _columns(
        self,
        begin: Expr,
        ahead: Expr | None,
        place: Expr,
        together: int,
        outputs: Expr,
        x_at: list[Expr],
        pitch: int,
    ) -> None:
        """Adds some columns, whose parts begin ``k * rows`` behind ``begin``, to the sums."""
        width = self.isa.vector
        columns = [bind(self.active[place + j]) for j in range(together)]
        at = [bind(begin + k * self.rows) for k in columns]
        later = []
        if ahead is not None:
            later = [
                bind(ahead + self.active[place + together + j] * self.rows) for j in range(together)
            ]
        x = [[bind(splat(self.x[base + k], width)) for k in columns] for base in x_at]
        with T.serial(T.floordiv(outputs, self.step)) as i:
            first = bind(i * self.step)
            for offset in later:
                prefetch(self.panels, offset + first, near=False)
            weights = [self._weights(offset + first) for offset in at]
            for v, place in enumerate(self._places(i)):
                for t, values in enumerate(x):
                    where = t * pitch + place
                    total = load(self.sums, where, width)
                    for weight, value in zip(weights, values, strict=True):
                        total = total + weight[v] * value
                    store(self.sums, where, total, width)

    def _places(self, i: Expr) -> list[Expr]:
        """The outputs of an iteration's vectors."""
        width = self.isa.vector
        if not self.halves:
            return [bind(i * width)]
        words = i * width
        first = bind(T.floordiv(words, 16) * 32 + T.floormod(words, 16))
        return [first, first + 16]

    def _weights(self, at: Expr) -> list[Expr]:
        """The vectors of an iteration's outputs in one column."""
        width = self.isa.vector
        if not self.halves:
            return [bind(load(self.panels, at, width))]
        pairs = bind(T.reinterpret(f"int32x{width}", load(self.panels, at, 2 * width)))
        low = T.shift_left(pairs, T.Broadcast(T.int32(16), width))
        high = T.bitwise_and(pairs, T.Broadcast(T.int32(-65536), width))
        return [bind(T.reinterpret(f"float32x{width}", half)) for half in (low, high)]


class _Emitter(ColumnTiles, RowKernel):
    spec: ColumnsLinear

    def __init__(self, spec: ColumnsLinear) -> None:
        layout = spec.layout
        RowKernel.__init__(self, spec, layout.rows)
        self.isa, self.rows, self.halves = spec.isa, layout.rows, layout.value_bits == 16
        self.in_features, self.y_features = spec.in_features, spec.out_features

    def weight(self) -> tuple[Tensor, ...]:
        spec, dtype = self.spec, "int16" if self.halves else "float32"
        count = spec.layout.panel_count(spec.out_features)
        return (Tensor("panels", (count, spec.in_features, spec.layout.rows), dtype),)

    def take(self, *packed: Expr) -> None:
        (self.panels,) = packed
        self.list_active(self.tokens, known=True)

    def place(self, unit: Expr) -> Expr:
        """A panel's first output."""
        return unit * self.rows

    def tile(self, row: Expr, token: Expr, count: int) -> None:
        spec, rows = self.spec, self.spec.layout.rows
        most = part_outputs(rows, count)
        panel = bind(row * spec.in_features)
        with T.serial(T.int64(-(-rows // most))) as i:
            first = bind(i * most)
            outputs = bind(T.min(T.int64(most), T.int64(rows) - first))
            begin = bind(panel + first)
            last = first + outputs == rows
            following = T.if_then_else(last, panel + spec.in_features * rows, begin + outputs)
            place = (bind(row + first), T.int64(spec.out_features) - (row + first))
            self.part(begin, bind(following), outputs, most, place, token, count)


def part_outputs(outputs: int, tokens: int) -> int:
    """Outputs whose sums of some tokens stay in the first-level cache."""
    return min(outputs, max(32, _SUMS // tokens // 32 * 32))
