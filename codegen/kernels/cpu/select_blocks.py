"""Chooses the blocks of keys that blocks of new tokens read: the kernel family of all selectors.

what the selector knows of every block of keys (parallel)      # the members of WEIGHINGS
for query head, block of queries (parallel):
  weights of the blocks of keys that it may see
  the blocks of the highest weights, and those always read, ascending    # top_ranks.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.block_weights import BlockWeights, QueryBlock
from sparsify.codegen.kernels.cpu.head_pattern_weights import HeadPatternWeights
from sparsify.codegen.kernels.cpu.line_weights import LineWeights
from sparsify.codegen.kernels.cpu.nearness_weights import NearnessWeights
from sparsify.codegen.kernels.cpu.paged_cache import PAGE, WHOLE, CacheOperands
from sparsify.codegen.kernels.cpu.pooled_weights import PooledWeights
from sparsify.codegen.kernels.cpu.query_aware_weights import QueryAwareWeights
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    Registers,
    Tensor,
    arguments,
    bind,
    in_name,
    load,
    prim_func,
    reduce_lanes,
    splat,
    store,
    symbol,
)
from sparsify.codegen.kernels.cpu.top_ranks import PADDING, TopRanks
from sparsify.layouts import LANES
from sparsify.ops import DENSITY_STEPS
from sparsify.selectors import BlockScoring

WEIGHINGS: dict[BlockScoring, type[BlockWeights]] = {
    "pooled": PooledWeights,
    "lines": LineWeights,
    "nearness": NearnessWeights,
    "query_aware": QueryAwareWeights,
    "head_patterns": HeadPatternWeights,
}


@dataclass(frozen=True)
class SelectBlocks:
    """The kernel's specification.

    Attributes:
        heads, kv_heads, head_dim: head ``h`` attends with key head ``h * kv_heads // heads``.
        features: features of the tensor that holds the query, where head 0 begins at ``offset``.
        scoring: how a block is weighed; ``gates``: whether a matrix of each head comes into it.
        block: queries, and pages, of a block.
        density, mass, sinks, recent: see `sparsify.ops.select_blocks`.
    """

    isa: Isa
    heads: int
    kv_heads: int
    head_dim: int
    features: int
    offset: int
    scale: float
    scoring: BlockScoring
    gates: bool
    block: tuple[int, int]
    density: float
    mass: float
    sinks: int
    recent: int

    @property
    def name(self) -> str:
        heads = f"h{self.heads}_{self.kv_heads}_{self.head_dim}_{self.features}p{self.offset}"
        shares = f"{in_name(self.density)}_{in_name(self.mass)}_{self.sinks}_{self.recent}"
        scoring = f"{self.scoring}{'_gates' * self.gates}_b{self.block[0]}_{self.block[1]}"
        return f"select_{scoring}_{self.isa.name}_{heads}_s{in_name(self.scale)}_{shares}"

    def build(self) -> Any:
        """A PrimFunc ``(query, keys[, operand], pages, lengths, counts, layer, length, y)``.

        Query is in lanes, ``operand`` is what the member reads besides. It fails when a page that
        a sequence holds is not in the pool, or a length, a count or a pattern is impossible.
        """
        return _Emitter(self).build()


class _Emitter:
    def __init__(self, spec: SelectBlocks) -> None:
        self.spec = spec
        self.width = spec.isa.vector
        self.cache = CacheOperands("select_blocks", spec.kv_heads, spec.head_dim)

    def build(self) -> Any:
        spec, cache, kind = self.spec, self.cache, WEIGHINGS[self.spec.scoring]
        with prim_func(spec.name) as result:
            keys, _, pages = cache.tensors
            query, keys, given, table, self.lengths, self.counts, layer, length, self.y = arguments(
                Tensor("query", (symbol(), spec.features, LANES)),
                keys,
                kind.operand(spec),
                pages,
                Tensor("lengths", (cache.batch,), "int64"),
                Tensor("counts", (cache.batch,), "int64"),
                Integer("layer"),
                Integer("length"),
                Tensor("y", (cache.batch, spec.heads, symbol(), symbol()), "int32"),
            )
            cache.bind(table, layer)
            self.length, self.size = length, spec.block[1] * PAGE
            # At least one: TVM's analyser would try a division by zero blocks.
            self.columns = bind(T.max(_runs(cache.table, spec.block[1]), T.int64(1)))
            self.rows = bind(T.max(_runs(length, spec.block[0]), T.int64(1)))
            self.padded = bind(_runs(self.columns, PADDING) * PADDING)
            # Memory is taken where the function begins: its size can follow from extents only.
            weighing = kind(spec, cache, query, keys, given, self.columns)
            weighing.allocate()
            tasks = bind(cache.batch * spec.heads * self.rows)
            self.weights = T.alloc_buffer((tasks * self.padded,), "float32", scope="global")
            self.ranks = T.alloc_buffer((tasks * self.padded,), "int32", scope="global")
            cache.check_reads(self.lengths, self.counts, length, WHOLE)
            weighing.prepare(self.lengths, self.counts, length)
            with T.parallel(tasks) as task:
                self._task(task, weighing)
        return result[0]

    def _task(self, task: Expr, weighing: Any) -> None:
        spec = self.spec
        plane, row = bind(T.floordiv(task, self.rows)), bind(T.floormod(task, self.rows))
        sequence, head = bind(T.floordiv(plane, spec.heads)), bind(T.floormod(plane, spec.heads))
        total, count = bind(self.lengths[sequence]), bind(self.counts[sequence])
        start = bind(row * spec.block[0])
        real = bind(T.min(count - start, T.int64(spec.block[0])))
        out = bind(task * self.columns)
        done = T.alloc_buffer((1,), "int64", scope="global")
        store(done, 0, T.int64(0), 1)

        def selected() -> None:
            first = bind(total - count + start)
            blocks = bind(T.floordiv(first + real - 1, self.size) + 1)
            at = bind(task * self.padded)
            token = bind(sequence * self.length + start)
            weighing.weigh(QueryBlock(sequence, head, token, real, blocks, total, self.weights, at))
            ranked = TopRanks(self.ranks, at, blocks, self.width)
            ranked.put(lambda offset: load(self.weights, at + offset, self.width))
            sinks = bind(T.min(T.int64(spec.sinks), blocks))
            near = bind(T.max(T.floordiv(first, self.size) - (spec.recent - 1), T.int64(0)))
            ranked.force(T.int64(0), sinks)
            ranked.force(near, blocks - near)
            forced = bind(T.min(sinks + blocks - near, blocks))
            steps = round(spec.density * DENSITY_STEPS)
            share = T.floordiv(blocks * steps + DENSITY_STEPS // 2, DENSITY_STEPS)
            places = bind(T.min(T.max(share, forced), blocks))
            if spec.mass:
                places = bind(T.min(T.max(self._enough(ranked, at, blocks), forced), places))
            ranked.each(
                places,
                lambda place, block: store(self.y, out + place, T.Cast("int32", block), 1),
            )
            store(done, 0, places, 1)

        with T.If(real > 0), T.Then():
            selected()
        with T.serial(self.columns - done[0]) as rest:
            store(self.y, out + done[0] + rest, T.int32(-1), 1)

    def _enough(self, ranked: TopRanks, at: Expr, blocks: Expr) -> Expr:
        """How many of the highest ranks have the mass; of equals the first are counted first."""
        width = self.width
        whole = Registers(1, width)
        whole[0] = splat(0.0, width)
        with T.serial(ranked.steps * width - blocks) as rest:
            store(self.weights, at + blocks + rest, T.float32(0.0), 1)
        with T.serial(ranked.steps) as step:
            whole[0] = whole[0] + load(self.weights, at + step * width, width)
        wanted = bind(
            reduce_lanes(bind(whole[0]), width, lambda a, b: a + b) * T.float32(self.spec.mass)
        )

        def weight(offset: Expr) -> Expr:
            return load(self.weights, at + offset, width)

        def has_mass(bound: Expr) -> Expr:
            return ranked.total(bound, weight) >= wanted

        bound = bind(T.Cast("int32", ranked.highest(has_mass)))
        share, taken = (T.alloc_buffer((1,), of, scope="global") for of in ("float32", "int64"))
        store(share, 0, ranked.total(bound, weight, above=True), 1)
        store(taken, 0, T.Cast("int64", ranked.how_many(bound, above=True)), 1)
        with T.serial(blocks) as block:
            equal = bind(self.ranks[at + block] == bound)
            with T.If(T.And(equal, share[0] < wanted)), T.Then():
                store(share, 0, share[0] + self.weights[at + block], 1)
                store(taken, 0, taken[0] + 1, 1)
        return bind(taken[0])


def _runs(count: Expr, size: int) -> Expr:
    """How many runs of ``size`` cover ``count``."""
    return T.floordiv(count + (size - 1), size)
