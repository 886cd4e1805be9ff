"""Sparse linear of any shape in wide tiles, weight in SELL.

The loops are those of `sparsify.codegen.kernels.cpu.sell`. K blocks and chunks are arguments, so
that one kernel serves every choice of them. It makes sums alone: whoever turns the tiles into rows
adds the epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.lane_linear import LaneSums
from sparsify.codegen.kernels.cpu.sell import SellTiles
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    LaneTile,
    Tensor,
    WideTile,
    arguments,
    bind,
    prim_func,
    symbol,
    tiled_tasks,
)
from sparsify.layouts import LANES


@dataclass(frozen=True)
class GeneralSell:
    """The kernel's specification.

    Attributes:
        rows: the layout's rows of a group.
        vectors: widest token tile, in vectors.
    """

    isa: Isa
    rows: int
    vectors: int

    @property
    def name(self) -> str:
        return f"general_sell_{self.isa.name}_r{self.rows}_v{self.vectors}"

    def build(self) -> Any:
        """A PrimFunc ``(x, starts, outputs, columns, values, k_block, chunk_groups, y)``.

        ``x[groups, in_features, 16]`` and ``y[groups, 1 + out_features, 16]`` in wide tiles. A
        window of the layout is a chunk, of ``chunk_groups`` groups.
        """
        return _Emitter(self).build()


class _Emitter(LaneSums, SellTiles):
    def __init__(self, spec: GeneralSell) -> None:
        super().__init__(spec.isa, spec.rows, ragged=False)
        self.spec = spec

    def build(self) -> Any:
        with prim_func(self.spec.name) as result:
            token_groups, in_features, y_features = symbol(), symbol(), symbol()
            entries, slots, stream, tail = symbol(), symbol(), symbol(), symbol()
            self.x, self.starts, self.outputs, self.columns, self.values, *rest = arguments(
                Tensor("x", (token_groups, in_features, LANES)),
                Tensor("starts", (entries,), "int32"),
                Tensor("outputs", (slots,), "int32"),
                Tensor("columns", (stream,), "int64"),
                Tensor("values", (tail,)),
                Integer("k_block"),
                Integer("chunk_groups"),
                Tensor("y", (token_groups, y_features, LANES)),
            )
            k_block, chunk_groups, self.y = rest
            blocks = bind(T.floordiv(in_features + (k_block - 1), k_block))
            groups = bind(T.floordiv(y_features + (self.rows - 2), self.rows))
            chunks = bind(T.floordiv(groups + (chunk_groups - 1), chunk_groups))
            self.set_sizes((y_features, in_features), k_block, blocks, groups, chunk_groups)
            self.bind_permute_controls()
            tiled_tasks(self.isa, token_groups, chunks, self.spec.vectors, self._tile, WideTile)
        return result[0]

    def _tile(self, tile: LaneTile, index: Expr, chunk: Expr) -> None:
        x_base = bind(tile.base(index, self.in_features))
        # A slot without a row has the output -1: the spare feature before the first.
        y_base = bind(tile.base(index, self.out_features) + tile.pitch)
        self.task(tile, chunk, x_base, y_base)
