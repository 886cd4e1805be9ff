"""Sums of several tokens from SELL: eight tokens are a vector, as sixteen are in lanes.

x8 = x, eight tokens side by side: [tile][column][token]
for group of R rows:                           # R accumulators in registers
  for step: acc[row, :] += value[row] * x8[column[row], :]

A nonzero takes one broadcast and one multiply-add, however many of the eight tokens there are.
"""

from __future__ import annotations

from dataclasses import replace

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.lane_linear import LaneSums
from sparsify.codegen.kernels.cpu.lanes import enter, leave, vectors
from sparsify.codegen.kernels.cpu.sell import SellTiles
from sparsify.codegen.kernels.cpu.simd import Expr, WideTile, bind

TOGETHER = 8
"""Tokens of a tile."""


def narrow(isa: Isa) -> Isa:
    """The instruction set with vectors of at most a tile."""
    if isa.vector <= TOGETHER:
        return isa
    return replace(isa, vector=TOGETHER, fma_per_cycle=2.0, loads_per_cycle=2.0, permuted_of_four=0)


class EightTokens(LaneSums, SellTiles):
    """Emits the sums of runs of row groups for all tokens, on scratch of its own.

    Attributes:
        y_first: where the features of a token of ``rows_y`` begin.
    """

    from_memory = True

    def __init__(self, isa: Isa, rows: int, ragged: bool, y_first: int = 0) -> None:
        super().__init__(narrow(isa), rows, ragged)
        self.y_first = y_first
        self.wide = WideTile(self.isa, TOGETHER // self.isa.vector)

    def prepare(self, rows_x: Expr, rows_y: Expr, tokens: Expr) -> None:
        """Takes scratch, where the function begins, and fills it with the activations.

        Args:
            rows_x, rows_y: activations and sums, row-major; sizes, and the weight's operands, are
                set before.
        """
        self.bind_permute_controls()
        self.rows_y, self.tokens = rows_y, tokens
        self.y_features = self.out_features + self.y_first
        tiles = T.floordiv(tokens + (TOGETHER - 1), TOGETHER)
        # One token is gathered.
        several = T.min(tokens - 1, T.int64(1))

        def scratch(features: Expr | int) -> Expr:
            size = T.max(several * tiles * (features * TOGETHER), T.int64(TOGETHER))
            return T.alloc_buffer((size,), "float32", scope="global")

        self.x, self.y = scratch(self.in_features), scratch(self.y_features)
        self.tiles = bind(tiles)
        with T.If(tokens > 1), T.Then(), T.serial(self.tiles) as tile:
            base = bind(self.wide.base(tile, self.in_features))
            for first, place in vectors(tile, TOGETHER, self.isa.vector, base):
                enter(rows_x, self.x, self.isa.vector, (first, tokens), self.in_features, place)

    def run(self, chunk: Expr, chunks: Expr, row: Expr, rows: Expr) -> None:
        """Stores all sums of some chunks of row groups, which are those of a run of rows."""
        with T.serial(self.tiles) as tile:
            x_base = bind(self.wide.base(tile, self.in_features))
            y_base = bind(self.wide.base(tile, self.y_features))
            first_row = bind(y_base + self.y_first * TOGETHER)
            with T.serial(chunks) as i:
                self.task(self.wide, bind(chunk + i), x_base, first_row)
            for first, place in vectors(tile, TOGETHER, self.isa.vector, y_base):
                leave(
                    self.y, self.rows_y, self.isa.vector, (first, self.tokens), self.y_features,
                    place, (bind(row + self.y_first), rows),
                )  # fmt: skip
