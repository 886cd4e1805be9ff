"""Blocks weighed by means in heads where these estimate attention well, and by lines elsewhere."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.block_weights import BlockWeights, QueryBlock
from sparsify.codegen.kernels.cpu.line_weights import LineWeights
from sparsify.codegen.kernels.cpu.pooled_weights import PooledWeights
from sparsify.codegen.kernels.cpu.simd import Expr, bind, choose, store
from sparsify.layouts import LANES
from sparsify.selectors.query_aware import MOST_DIVERGENCE

_LEAST = 1e-30


class QueryAwareWeights(BlockWeights):
    """Before any block of queries, each head compares both for its latest queries."""

    def __init__(self, *operands: Any) -> None:
        super().__init__(*operands)
        self.means, self.lines = PooledWeights(*operands), LineWeights(*operands)

    def allocate(self) -> None:
        self.means.allocate()
        self.lines.allocate()
        planes = self.cache.batch * self.spec.heads
        # A vector more, as means are weighed by whole vectors.
        self.row = self.columns + self.width
        self.estimates = T.alloc_buffer((planes * self.row,), "float32", scope="global")
        self.divergence = T.alloc_buffer((planes,), "float32", scope="global")

    def prepare(self, lengths: Expr, counts: Expr, length: Expr) -> None:
        self.means.prepare(lengths, counts, length)
        self.lines.prepare(lengths, counts, length)
        heads = self.spec.heads
        with T.parallel(self.cache.batch * heads) as plane:
            sequence, head = bind(T.floordiv(plane, heads)), bind(T.floormod(plane, heads))
            total, count = bind(lengths[sequence]), bind(counts[sequence])
            latest = bind(T.min(count, T.int64(LANES)))
            blocks = bind(T.floordiv(total + (self.size - 1), self.size))
            with T.If(latest > 0), T.Then():
                token = bind(sequence * length + (count - latest))
                row = QueryBlock(
                    *(sequence, head, token, latest, blocks, total),
                    *(self.estimates, bind(plane * self.row)),
                )
                self.means.weigh(row)
                self._compare(plane, row.at, blocks, latest)

    def _compare(self, plane: Expr, at: Expr, blocks: Expr, latest: Expr) -> None:
        """Stores the Jensen-Shannon divergence of the estimate and the truth."""
        truth = bind(plane * self.columns)
        whole = T.alloc_buffer((1,), "float32", scope="global")
        store(whole, 0, T.float32(0.0), 1)
        with T.serial(blocks) as block:
            store(whole, 0, whole[0] + self.estimates[at + block], 1)
        shares = (
            bind(T.float32(1.0) / whole[0]),
            bind(T.float32(1.0) / T.Cast("float32", latest)),
        )
        store(self.divergence, plane, T.float32(0.0), 1)
        with T.serial(blocks) as block:
            a = bind(self.estimates[at + block] * shares[0])
            b = bind(self.lines.found[truth + block] * shares[1])
            half = T.float32(0.5)
            apart = (_information(a) + _information(b)) * half - _information((a + b) * half)
            store(self.divergence, plane, self.divergence[plane] + apart, 1)

    def weigh(self, row: QueryBlock) -> None:
        found = self.divergence[row.sequence * self.spec.heads + row.head]
        trusted = bind(found < T.float32(MOST_DIVERGENCE**2))
        choose(True, trusted, lambda: self.means.weigh(row), lambda: self.lines.weigh(row))


def _information(share: Expr) -> Expr:
    share = bind(share)
    return bind(share * T.log(T.max(share, T.float32(_LEAST))))
