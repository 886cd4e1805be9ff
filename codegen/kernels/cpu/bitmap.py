"""Sparse linear for few tokens, weight as bitmap: nonzeros are expanded, then dense multiply-adds.

for chunk of row groups (parallel):
  for group of R rows:                      # its weights stay in the first-level cache
    for token tile:                         # R x tokens accumulators in registers
      for word of columns:
        for r: acc[r, :] += expand(mask[r], values) * x[:, word]
      sums over lanes, store
  bias, activation, residual
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.bitmap_words import Words, words_of
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.row_kernel import RowKernel
from sparsify.codegen.kernels.cpu.rows import (
    ahead,
    lane_sums,
    ragged_load,
    store_rows,
)
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    Tensor,
    bind,
    i64,
    prefetch,
    symbol,
)
from sparsify.layouts import Bitmap

_AHEAD = 4096
"""Bytes of the value stream between a prefetch and its use."""

_MASKS_AHEAD = 1024
"""Bytes of the mask stream between a prefetch and its use."""

_LINE = 64
"""Bytes of a cache line."""


@dataclass(frozen=True)
class BitmapLinear:
    """The kernel's specification.

    Attributes:
        tokens: widest token tile, a power of two.
    """

    isa: Isa
    out_features: int
    in_features: int
    layout: Bitmap
    epilogue: Epilogue
    tokens: int

    @property
    def name(self) -> str:
        layout = self.layout
        return (
            f"bitmap_{self.isa.name}_{self.out_features}x{self.in_features}_r{layout.rows}"
            f"_b{layout.value_bits}_t{self.tokens}_{self.epilogue.name}"
        ).rstrip("_")

    def build(self) -> Any:
        """A PrimFunc ``(x, starts, masks, values[, bias][, residual], y)``."""
        return _Emitter(self).build()


class _Emitter(RowKernel):
    spec: BitmapLinear

    def __init__(self, spec: BitmapLinear) -> None:
        super().__init__(spec, spec.layout.rows)
        self.rows, self.word = spec.layout.rows, spec.layout.word
        self.groups = spec.layout.groups(spec.out_features)
        self.words = spec.layout.words(spec.in_features)

    def weight(self) -> tuple[Tensor, ...]:
        fp32 = self.spec.layout.value_bits == 32
        return (
            Tensor("starts", (self.groups + 1,), "int32"),
            Tensor("masks", (self.groups, self.words, self.rows), "int16" if fp32 else "int32"),
            Tensor("values", (symbol(),), "float32" if fp32 else "int16"),
        )

    def take(self, *packed: Expr) -> None:
        self.starts, self.masks, self.values = packed
        self.expansion: Words = words_of(self.spec.isa, self.spec.layout, bind(self.starts[0]))

    def tile(self, group: Expr, token: Expr, count: int) -> None:
        spec, width = self.spec, self.spec.isa.vector
        total = Registers(self.rows * count, width)
        total.clear()
        self.position = T.alloc_buffer((1,), "int64", scope="global")
        begin = bind(i64(self.starts[group]))
        T.buffer_store(self.position, begin, [0])
        size = spec.layout.value_bits // 8
        self.distance = ahead(token, _AHEAD // size, self.starts[group + 1] - self.starts[group])
        masks = bind(group * (self.words * self.rows))
        x_at = [bind((token + t) * spec.in_features) for t in range(count)]
        whole = spec.in_features // self.word
        with T.serial(T.int64(whole)) as word:
            column = bind(word * self.word)
            self._word(
                total, bind(masks + word * self.rows), [at + column for at in x_at], self.word
            )
        if left := spec.in_features - whole * self.word:
            at = [at + whole * self.word for at in x_at]
            self._word(total, bind(masks + whole * self.rows), at, left)
        row = bind(group * self.rows)
        left_rows = spec.out_features - row if spec.out_features % self.rows else None
        for t in range(count):
            sums = lane_sums([total[r * count + t] for r in range(self.rows)], width)
            offset = bind((token + t) * spec.out_features + row)
            store_rows(self.y, offset, sums, self.rows, left_rows)

    def _word(self, total: Registers, masks: Expr, x_at: list[Expr], columns: int) -> None:
        width, count = self.spec.isa.vector, len(x_at)
        x = [
            [
                bind(ragged_load(self.x, at + v, columns - v, width))
                for v in range(0, self.word, width)
            ]
            for at in x_at
        ]
        self._prefetch(masks)
        for r in range(self.rows):
            mask = bind(self.masks[masks + r])
            position = bind(self.position[0])
            weights = self.expansion.spread(mask, self.values, position)
            T.buffer_store(self.position, position + i64(T.popcount(mask)), [0])
            for t in range(count):
                for v, weight in enumerate(weights):
                    if v * width < columns:
                        total[r * count + t] = total[r * count + t] + weight * x[t][v]

    def _prefetch(self, masks: Expr) -> None:
        """As many lines as half the values of a step fill; denser ones stream unasked."""
        size = self.spec.layout.value_bits // 8
        step = self.rows * self.word * size
        for line in range(0, max(1, step // 2), _LINE):
            prefetch(self.values, self.position[0] + self.distance + line // size)
        prefetch(self.masks, masks + _MASKS_AHEAD * 8 // self.word)
