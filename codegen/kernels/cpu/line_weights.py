"""Blocks weighed by lines of attention: columns, and diagonals."""

from __future__ import annotations

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.block_weights import LOWEST, BlockWeights, QueryBlock
from sparsify.codegen.kernels.cpu.math import LOG2E, Vector, exp2
from sparsify.codegen.kernels.cpu.paged_cache import PAGE
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    bind,
    either,
    load,
    reduce_lanes,
    splat,
    store,
)
from sparsify.layouts import LANES


class LineWeights(BlockWeights):
    """What the latest queries of the sequence give to a block, and to the one as far before them.

    Their softmax is made block by block, each relative to its own maximum, and put together at the
    end.
    """

    def allocate(self) -> None:
        planes = self.cache.batch * self.spec.heads
        self.found = T.alloc_buffer((planes * self.columns,), "float32", scope="global")
        self.sums = T.alloc_buffer((planes * self.columns * 2,), "float32", scope="global")

    def prepare(self, lengths: Expr, counts: Expr, length: Expr) -> None:
        heads = self.spec.heads
        with T.parallel(self.cache.batch * heads) as plane:
            sequence, head = bind(T.floordiv(plane, heads)), bind(T.floormod(plane, heads))

            def found() -> None:
                self._find(lengths[sequence], counts[sequence], length, (sequence, head))

            either(True if self.wanted is None else self.wanted(head), found, lambda: None)

    def _find(self, total: Expr, count: Expr, length: Expr, place: tuple[Expr, Expr]) -> None:
        """Of the latest of so many new tokens of a sequence, in one head."""
        sequence, head = place
        total, count = bind(total), bind(count)
        target = bind((sequence * self.spec.heads + head) * self.columns)
        with T.serial(self.columns) as block:
            store(self.found, target + block, T.float32(0.0), 1)
        latest = bind(T.min(count, T.int64(LANES)))
        with T.serial(latest) as number:
            token = bind(sequence * length + (count - latest) + number)
            source = bind(self._query_place(token, head))
            seen = bind(total - latest + number + 1)
            self._one(sequence, self._kv_head(head), source, seen, target)

    def _one(self, sequence: Expr, kv_head: Expr, source: Expr, seen: Expr, target: Expr) -> None:
        """Adds one query's attention, over ``seen`` keys."""
        width, parts = self.width, PAGE // self.width
        query = T.alloc_buffer((self.dim,), "float32", scope="local")
        with T.serial(T.int64(self.dim)) as d:
            value = self.query[source + d * LANES] * T.float32(self.spec.scale * LOG2E)
            store(query, d, value, 1)
        scores = T.alloc_buffer((self.size,), "float32", scope="local")
        best = T.alloc_buffer((1,), "float32", scope="global")
        store(best, 0, T.float32(LOWEST), 1)
        blocks = bind(T.floordiv(seen + (self.size - 1), self.size))
        pair = bind(target * 2)
        with T.serial(blocks) as block:
            held = bind(T.min(seen - block * self.size, T.int64(self.size)))
            used = bind(T.floordiv(held + (PAGE - 1), PAGE))
            highest = Registers(1, width)
            highest[0] = splat(LOWEST, width)
            with T.serial(used) as page:
                number = block * self.spec.block[1] + page
                at = bind(self.cache.block(sequence, number, kv_head))
                sums = Registers(parts, width)
                for part in range(parts):
                    sums[part] = splat(0.0, width)
                with T.serial(T.int64(self.dim)) as d:
                    q = bind(splat(query[d], width))
                    for part in range(parts):
                        key = load(self.keys, at + (d * PAGE + part * width), width)
                        sums[part] = sums[part] + key * q
                for part in range(parts):
                    slot = bind(page * PAGE + part * width)
                    lanes = T.Ramp(slot, T.int64(1), width) if width > 1 else slot
                    end = T.Broadcast(held, width) if width > 1 else held
                    score = T.Select(lanes < end, sums[part], splat(LOWEST, width))
                    highest[0] = T.max(highest[0], bind(score))
                    store(scores, slot, score, width)
            top = bind(reduce_lanes(bind(highest[0]), width, T.max))
            sums = Registers(1, width)
            sums[0] = splat(0.0, width)
            with T.serial(used * parts) as step:
                score = load(scores, step * width, width) - splat(top, width)
                weight = exp2(Vector(bind(score), width)).value
                # Lanes behind the last key are as far below as exp2 goes, and still not nothing.
                lanes = T.Ramp(step * width, T.int64(1), width) if width > 1 else step * width
                end = T.Broadcast(held, width) if width > 1 else held
                sums[0] = sums[0] + T.Select(lanes < end, weight, splat(0.0, width))
            whole = reduce_lanes(bind(sums[0]), width, lambda a, b: a + b)
            store(self.sums, pair + block * 2, top, 1)
            store(self.sums, pair + block * 2 + 1, whole, 1)
            store(best, 0, T.max(best[0], top), 1)
        shares = T.alloc_buffer((1,), "float32", scope="global")
        store(shares, 0, T.float32(0.0), 1)
        with T.serial(blocks) as block:
            shift = Vector(self.sums[pair + block * 2] - best[0], 1)
            share = bind(exp2(shift).value * self.sums[pair + block * 2 + 1])
            store(self.sums, pair + block * 2, share, 1)
            store(shares, 0, shares[0] + share, 1)
        inverse = bind(T.float32(1.0) / shares[0])
        with T.serial(blocks) as block:
            value = self.found[target + block] + self.sums[pair + block * 2] * inverse
            store(self.found, target + block, value, 1)

    def weigh(self, row: QueryBlock) -> None:
        source = bind((row.sequence * self.spec.heads + row.head) * self.columns)
        last = bind(T.floordiv(row.total + (self.size - 1), self.size))
        with T.serial(row.blocks) as block:
            ahead = self.found[source + block + (last - row.blocks)]
            store(row.weights, row.at + block, self.found[source + block] + ahead, 1)
