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

_TOGETHER = 8
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


class _Emitter(RowKernel):
    spec: ColumnsLinear

    def __init__(self, spec: ColumnsLinear) -> None:
        super().__init__(spec, spec.layout.rows)
        self.rows, self.halves = spec.layout.rows, spec.layout.value_bits == 16
        self.panel_count = spec.layout.panel_count(spec.out_features)
        self.step = 2 * spec.isa.vector if self.halves else spec.isa.vector
        """Outputs that one iteration adds to."""

    def weight(self) -> tuple[Tensor, ...]:
        dtype = "int16" if self.halves else "float32"
        return (Tensor("panels", (self.panel_count, self.spec.in_features, self.rows), dtype),)

    def take(self, *packed: Expr) -> None:
        (self.panels,) = packed
        spec = self.spec
        self.active = ActiveSet(
            spec.isa, self.x, self.tokens, spec.in_features, known=True, spare=_TOGETHER
        )
        self.active.wrap(_TOGETHER)

    def place(self, unit: Expr) -> Expr:
        """A panel's first output."""
        return unit * self.rows

    def tile(self, row: Expr, token: Expr, count: int) -> None:
        part = min(self.rows, max(32, _SUMS // count // 32 * 32))
        with T.serial(T.int64(-(-self.rows // part))) as i:
            first = bind(i * part)
            outputs = bind(T.min(T.int64(part), T.int64(self.rows) - first))
            self._part(row, first, outputs, part, token, count)

    def _part(
        self, row: Expr, first: Expr, outputs: Expr, most: int, token: Expr, count: int
    ) -> None:
        spec, width = self.spec, self.spec.isa.vector
        pitch = most + _SPREAD
        self.sums = T.alloc_buffer((count * pitch,), "float32", scope="local")
        nothing = splat(0.0, width)
        for t in range(count):
            base = t * pitch
            along(most, width, lambda at, wide, b=base: store(self.sums, b + at, nothing, wide))
        begin = bind(row * spec.in_features + first)
        x_at = [bind((token + t) * spec.in_features) for t in range(count)]
        # The part that follows begins with the first columns again.
        in_panel = first + outputs < self.rows
        following = bind(
            T.if_then_else(in_panel, begin + outputs, begin + spec.in_features * self.rows - first)
        )
        whole = bind(T.floordiv(self.active.count, _TOGETHER))
        with T.serial(whole) as group:
            place = bind(group * _TOGETHER)
            after = place + _TOGETHER < self.active.count
            ahead = bind(T.if_then_else(after, begin, following))
            self._columns(begin, ahead, place, _TOGETHER, outputs, x_at, pitch)
        with T.serial(self.active.count - whole * _TOGETHER) as rest:
            place = bind(whole * _TOGETHER + rest)
            self._columns(begin, None, place, 1, outputs, x_at, pitch)
        left = bind(T.min(outputs, T.int64(spec.out_features) - (row + first)))
        for t in range(count):
            y_at = bind((token + t) * spec.out_features + row + first)
            base = t * pitch
            along(
                left,
                width,
                lambda at, wide, y=y_at, b=base: store(
                    self.y, y + at, load(self.sums, b + at, wide), wide
                ),
            )

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
        width = self.spec.isa.vector
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
        width = self.spec.isa.vector
        if not self.halves:
            return [bind(i * width)]
        words = i * width
        first = bind(T.floordiv(words, 16) * 32 + T.floormod(words, 16))
        return [first, first + 16]

    def _weights(self, at: Expr) -> list[Expr]:
        """The vectors of an iteration's outputs in one column."""
        width = self.spec.isa.vector
        if not self.halves:
            return [bind(load(self.panels, at, width))]
        pairs = bind(T.reinterpret(f"int32x{width}", load(self.panels, at, 2 * width)))
        low = T.shift_left(pairs, T.Broadcast(T.int32(16), width))
        high = T.bitwise_and(pairs, T.Broadcast(T.int32(-65536), width))
        return [bind(T.reinterpret(f"float32x{width}", half)) for half in (low, high)]
