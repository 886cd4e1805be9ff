"""How blocks of keys are weighed for a block of queries: the members of `SelectBlocks`.

Each has scratch of its own, which `prepare` fills with what it knows of all blocks of keys before
any block of queries is looked at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.math import LOG2E, Vector, exp2
from sparsify.codegen.kernels.cpu.paged_cache import PAGE, CacheOperands
from sparsify.codegen.kernels.cpu.query_tiles import place_in_lanes
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
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

_LOWEST = -3e38


@dataclass(frozen=True)
class QueryBlock:
    """One block of queries of one head, and where its weights go.

    Attributes:
        sequence, head: of the batch; of the query heads.
        token, real: its first token in the query tensor, and how many of its tokens are real.
        blocks: of keys that it may see; their weights go to ``weights`` from ``at`` on.
        total: keys of the sequence.
    """

    sequence: Expr
    head: Expr
    token: Expr
    real: Expr
    blocks: Expr
    total: Expr
    weights: Expr
    at: Expr


class BlockWeights(ABC):
    """One way of weighing.

    Attributes:
        columns: blocks of keys that a page table has room for.
    """

    def __init__(
        self,
        spec: SelectBlocks,
        cache: CacheOperands,
        query: Expr,
        keys: Expr,
        gates: Expr,
        columns: Expr,
    ) -> None:
        self.spec, self.cache = spec, cache
        self.query, self.keys, self.gates, self.columns = query, keys, gates, columns
        self.width, self.dim = spec.isa.vector, spec.head_dim
        self.size = spec.block[1] * PAGE

    @abstractmethod
    def allocate(self) -> None:
        """Takes scratch, where the function begins."""

    @abstractmethod
    def prepare(self, lengths: Expr, counts: Expr, length: Expr) -> None:
        """Fills the scratch."""

    @abstractmethod
    def weigh(self, row: QueryBlock) -> None:
        """Writes the weights of the blocks of keys that a block of queries may see."""

    def _kv_head(self, head: Expr) -> Expr:
        return bind(T.floordiv(head * self.spec.kv_heads, self.spec.heads))

    def _query_place(self, token: Expr, head: Expr) -> Expr:
        """Offset of feature 0 of a token's query."""
        feature = (self.spec.offset + head * self.dim) * LANES
        return place_in_lanes(token, self.spec.features) + feature


class PooledWeights(BlockWeights):
    """The softmax over blocks of the mean query's products with mean keys."""

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
            with T.If(held > 0), T.Then():
                self._mean(sequence, block, head, held, bind(task * self.dim))

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
        store(best, 0, T.float32(_LOWEST), 1)
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
        if self.gates is None:
            return pooled
        gated = T.alloc_buffer((self.dim,), "float32", scope="local")
        with T.serial(T.int64(self.dim)) as e:
            store(gated, e, T.float32(0.0), 1)
        with T.serial(T.int64(self.dim)) as d:
            source = bind((row.head * self.dim + d) * self.dim)

            def add(e: Expr, lanes: int) -> None:
                product = load(self.gates, source + e, lanes) * splat(pooled[d], lanes)
                store(gated, e, load(gated, e, lanes) + product, lanes)

            along(self.dim, self.width, add)
        return gated


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
            total, count = bind(lengths[sequence]), bind(counts[sequence])
            target = bind(plane * self.columns)
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
        store(best, 0, T.float32(_LOWEST), 1)
        blocks = bind(T.floordiv(seen + (self.size - 1), self.size))
        pair = bind(target * 2)
        with T.serial(blocks) as block:
            held = bind(T.min(seen - block * self.size, T.int64(self.size)))
            used = bind(T.floordiv(held + (PAGE - 1), PAGE))
            highest = Registers(1, width)
            highest[0] = splat(_LOWEST, width)
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
                    score = T.Select(lanes < end, sums[part], splat(_LOWEST, width))
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
