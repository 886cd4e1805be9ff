"""Blocks weighed by their distance, without a look at them."""

from __future__ import annotations

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.block_weights import BlockWeights, QueryBlock
from sparsify.codegen.kernels.cpu.simd import Expr, store


class NearnessWeights(BlockWeights):
    """One over the distance from the block of the last query, where it is 1."""

    def allocate(self) -> None:
        """Takes none."""

    def prepare(self, lengths: Expr, counts: Expr, length: Expr) -> None:
        """Knows all."""

    def weigh(self, row: QueryBlock) -> None:
        with T.serial(row.blocks) as block:
            share = T.float32(1.0) / T.Cast("float32", row.blocks - block)
            store(row.weights, row.at + block, share, 1)
