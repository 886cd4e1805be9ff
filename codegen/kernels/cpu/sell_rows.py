"""Sparse linear for few tokens from SELL.

for chunk of row groups (parallel):
  one token:                                   # sell_gather.py
    acc[rows] += values[rows] * gather(x, columns[rows])
  several, eight by eight:                     # sell_eights.py
    acc[row, :] += value[row] * x8[column[row], :]
  bias, activation, residual

Gathering takes a load for each nonzero and token, eight tokens side by side one for each nonzero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.row_kernel import RowKernel
from sparsify.codegen.kernels.cpu.sell import sell_tensors
from sparsify.codegen.kernels.cpu.sell_eights import TOGETHER, EightTokens
from sparsify.codegen.kernels.cpu.sell_gather import GatheredSums
from sparsify.codegen.kernels.cpu.simd import Expr, Tensor, choose
from sparsify.layouts import Sell


@dataclass(frozen=True)
class SellRowsLinear:
    """The kernel's specification."""

    isa: Isa
    out_features: int
    in_features: int
    layout: Sell
    epilogue: Epilogue

    @property
    def tokens(self) -> int:
        return TOGETHER

    @property
    def name(self) -> str:
        layout = self.layout
        return (
            f"sell_rows_{self.isa.name}_{self.out_features}x{self.in_features}_r{layout.rows}"
            f"_k{layout.k_block}_w{layout.window}_{self.epilogue.name}"
        ).rstrip("_")

    def build(self) -> Any:
        """A PrimFunc ``(x, starts, outputs, columns, values[, bias][, residual], y)``."""
        return _Emitter(self, self.layout.window).build()


class SellRowSums(EightTokens):
    """Emits the sums of runs of row groups, of one token by gathers."""

    def __init__(self, isa: Isa, rows: int, ragged: bool, y_first: int = 0) -> None:
        super().__init__(isa, rows, ragged, y_first)
        self.one = GatheredSums(isa, rows, ragged, y_first)

    def take(self, x: Expr, packed: Sequence[Expr], y: Expr, tokens: Expr) -> None:
        """Is given the operands, where the function begins, after the sizes: it takes scratch."""
        one = self.one
        one.x, one.y = x, y
        one.k_block, one.blocks, one.groups = self.k_block, self.blocks, self.groups
        for sums in (one, self):
            sums.starts, sums.outputs, sums.columns, sums.values = packed
        self.prepare(x, y, tokens)

    def run(self, chunk: Expr, chunks: Expr, row: Expr, rows: Expr) -> None:
        several = super().run
        choose(
            True,
            self.tokens == 1,
            lambda: self.one.run(row, rows),
            lambda: several(chunk, chunks, row, rows),
        )


class _Emitter(RowKernel):
    spec: SellRowsLinear

    def weight(self) -> tuple[Tensor, ...]:
        return sell_tensors(self.spec.layout, self.spec.out_features, self.spec.in_features)

    def take(self, *packed: Expr) -> None:
        spec, layout = self.spec, self.spec.layout
        shape = spec.out_features, spec.in_features
        self.both = SellRowSums(spec.isa, layout.rows, spec.out_features % layout.rows != 0)
        blocks, groups = layout.blocks(spec.in_features), layout.groups(spec.out_features)
        self.both.set_sizes(shape, layout.k_block, blocks, groups, layout.window // layout.rows)
        self.both.take(self.x, packed, self.y, self.tokens)

    def sums(self, first: Expr, units: Expr, row: Expr, rows: Expr) -> None:
        self.both.run(first, units, row, rows)
