"""Blocks weighed by their mean key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.block_weights import LOWEST, BlockWeights, QueryBlock
from sparsify.codegen.kernels.cpu.math import LOG2E, Vector, exp2
from sparsify.codegen.kernels.cpu.paged_cache import PAGE
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    Tensor,
    along,
    bind,
    load,
    reduce_lanes,
    splat,
    store,
)
from sparsify.layouts import LANES

if TYPE_CHECKING:
    from sparsify.codegen.kernels.cpu.select_blocks import SelectBlocks


class PooledWeights(BlockWeights):
    """The softmax over blocks of the mean query's products with mean keys."""

    @classmethod
    def operand(cls, spec: SelectBlocks) -> Tensor | None:
        matrices = (spec.heads, spec.head_dim, spec.head_dim)
        return Tensor("gates", matrices) if spec.gates else None

    def allocate(self) -> None:
        size = self.cache.batch * self.columns * (self.spec.kv_heads * self.dim)
        self.means = T.alloc_buffer((size,), "float32", scope="global")

    def prepare(self, lengths: Expr, counts: Expr, length: Expr) -> None:
        kv_heads = self.spec.kv_heads
        with T.parallel(self.cache.batch * self.columns * kv_heads) as task:
            row, block = (
                bind(T.floordiv(task, self.columns)),
                bind(T.floormod(task, self.columns)),
            )
            sequence, head = bind(T.floordiv(row, kv_heads)), bind(T.floormod(row, kv_heads))
            held = bind(T.min(lengths[sequence] - block * self.size, T.int64(self.size)))
            with T.If(T.And(held > 0, self._needed(head))), T.Then():
                self._mean(sequence, block, head, held, bind(task * self.dim))

    def _needed(self, kv_head: Expr) -> Expr:
        """Whether a query head that reads the key head is weighed."""
        if self.wanted is None:
            return True
        count = T.alloc_buffer((1,), "int32", scope="global")
        store(count, 0, T.int32(0), 1)
        with T.serial(T.int64(self.spec.heads)) as head:
            reads = T.And(self._kv_head(head) == kv_head, self.wanted(head))
            store(count, 0, count[0] + T.Cast("int32", reads), 1)
        return bind(count[0] > 0)

    def _mean(self, sequence: Expr, block: Expr, head: Expr, held: Expr, target: Expr) -> None:
        width, parts = self.width, PAGE // self.width
        full = bind(T.floordiv(held, PAGE))
        pages = T.alloc_buffer((self.spec.block[1],), "int64", scope="global")
        first = bind(block * self.spec.block[1])
        with T.serial(T.floordiv(held + (PAGE - 1), PAGE)) as page:
            store(pages, page, self.cache.block(sequence, first + page, head), 1)
        share = bind(T.float32(1.0) / T.Cast("float32", held))
        with T.serial(T.int64(self.dim)) as d:
            sums = Registers(1, width)
            sums[0] = splat(0.0, width)
            with T.serial(full) as page:
                at = bind(pages[page] + d * PAGE)
                for part in range(parts):
                    sums[0] = sums[0] + load(self.keys, at + part * width, width)
            whole = T.alloc_buffer((1,), "float32", scope="global")
            store(whole, 0, reduce_lanes(bind(sums[0]), width, lambda a, b: a + b), 1)
            with T.serial(held - full * PAGE) as slot:
                store(whole, 0, whole[0] + self.keys[pages[full] + d * PAGE + slot], 1)
            store(self.means, target + d, whole[0] * share, 1)

    def weigh(self, row: QueryBlock) -> None:
        pooled = self._pooled(row)
        plane = row.sequence * self.spec.kv_heads + self._kv_head(row.head)
        means = bind(plane * (self.columns * self.dim))
        width, weights, at = self.width, row.weights, row.at
        best = T.alloc_buffer((1,), "float32", scope="global")
        store(best, 0, T.float32(LOWEST), 1)
        with T.serial(row.blocks) as block:
            sums, source = Registers(1, width), bind(means + block * self.dim)
            sums[0] = splat(0.0, width)
            rest = T.alloc_buffer((1,), "float32", scope="global")
            store(rest, 0, T.float32(0.0), 1)

            def add(d: Expr, lanes: int, sums: Registers = sums, source: Expr = source) -> None:
                product = load(pooled, d, lanes) * load(self.means, source + d, lanes)
                if lanes == width:
                    sums[0] = sums[0] + product
                else:
                    part = reduce_lanes(bind(product), lanes, lambda a, b: a + b)
                    store(rest, 0, rest[0] + part, 1)

            along(self.dim, width, add)
            score = bind(rest[0] + reduce_lanes(bind(sums[0]), width, lambda a, b: a + b))
            store(weights, at + block, score, 1)
            store(best, 0, T.max(best[0], score), 1)
        highest = bind(best[0])
        with T.serial(T.floordiv(row.blocks + (width - 1), width)) as step:
            score = load(weights, at + step * width, width) - splat(highest, width)
            store(weights, at + step * width, exp2(Vector(bind(score), width)).value, width)

    def _pooled(self, row: QueryBlock) -> Expr:
        """The mean query times the scale of exp2's domain, and times the head's matrix."""
        pooled = T.alloc_buffer((self.dim,), "float32", scope="local")
        share = bind(T.float32(self.spec.scale * LOG2E) / T.Cast("float32", row.real))
        with T.serial(T.int64(self.dim)) as d:
            store(pooled, d, T.float32(0.0), 1)
        with T.serial(row.real) as number:
            source = bind(self._query_place(row.token + number, row.head))
            with T.serial(T.int64(self.dim)) as d:
                store(pooled, d, pooled[d] + self.query[source + d * LANES] * share, 1)
        if not self.spec.gates:
            return pooled
        gated = T.alloc_buffer((self.dim,), "float32", scope="local")
        with T.serial(T.int64(self.dim)) as e:
            store(gated, e, T.float32(0.0), 1)
        with T.serial(T.int64(self.dim)) as d:
            source = bind((row.head * self.dim + d) * self.dim)

            def add(e: Expr, lanes: int) -> None:
                product = load(self.tensor, source + e, lanes) * splat(pooled[d], lanes)
                store(gated, e, load(gated, e, lanes) + product, lanes)

            along(self.dim, self.width, add)
        return gated
