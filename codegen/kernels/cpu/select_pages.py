"""Chooses the pages that new tokens read: the kernel family of all selectors.

    for token, kv head (parallel):
      for page, query head: score                                 # page_scores.py
      rank of a page = largest over query heads of score - best score of the head
      the budget-th highest rank, bit by bit, by counting
      the pages above it, and as many of its equals as fit, ascending

Ranks are compared as integers in the order of the floats, so the search takes 32 counts whatever
the scores are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.page_scores import SCORINGS, PageScores
from sparsify.codegen.kernels.cpu.paged_cache import PAGE, WHOLE, CacheOperands
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    Registers,
    Tensor,
    arguments,
    bind,
    choose,
    i64,
    load,
    prim_func,
    reduce_lanes,
    splat,
    store,
    symbol,
)
from sparsify.selectors import Scoring

_PADDING = 16
"""Pages' scores are padded to a multiple of this, so that they are whole vectors."""

_HIGHEST, _LOWEST = 2**31 - 1, -(2**31)


@dataclass(frozen=True)
class SelectPages:
    """The kernel's specification.

    Attributes:
        heads, kv_heads, head_dim: head ``h`` attends with key head ``h * kv_heads // heads``.
        features: features of the tensor that holds the query, where head 0 begins at ``offset``.
        scoring: how a page is scored.
        channels: features of each key head that are read, None for all.
        budget, sinks, recent: see `sparsify.ops.select_pages`.
    """

    isa: Isa
    heads: int
    kv_heads: int
    head_dim: int
    features: int
    offset: int
    scoring: Scoring
    channels: int | None
    budget: int
    sinks: int
    recent: int

    @property
    def name(self) -> str:
        heads = f"h{self.heads}_{self.kv_heads}_{self.head_dim}_{self.features}p{self.offset}"
        pages = f"{self.budget}_{self.sinks}_{self.recent}"
        scoring = f"{self.scoring}{'' if self.channels is None else self.channels}"
        return f"select_pages_{scoring}_{self.isa.name}_{heads}_{pages}"

    def build(self) -> Any:
        """A PrimFunc ``(query, keys[, tensor], pages, lengths, counts, layer, length, y)``.

        Query is ``[batch * length, features]``. It fails when a page that a sequence holds is not
        in the pool, a channel is no feature, or a length or a count is impossible.
        """
        return _Emitter(self).build()


class _Emitter:
    def __init__(self, spec: SelectPages) -> None:
        self.spec = spec
        self.width = spec.isa.vector
        self.group = spec.heads // spec.kv_heads
        self.cache = CacheOperands("select_pages", spec.kv_heads, spec.head_dim)

    def build(self) -> Any:
        spec, cache = self.spec, self.cache
        scoring = SCORINGS[spec.scoring]
        with prim_func(spec.name) as result:
            tokens = symbol()
            keys, _, pages = cache.tensors
            query, keys, tensor, table, self.lengths, self.counts, layer, self.length, self.y = (
                arguments(
                    Tensor("query", (tokens, spec.features)),
                    keys,
                    scoring.tensor(spec, cache),
                    pages,
                    Tensor("lengths", (cache.batch,), "int64"),
                    Tensor("counts", (cache.batch,), "int64"),
                    Integer("layer"),
                    Integer("length"),
                    Tensor("y", (cache.batch, spec.kv_heads, symbol(), spec.budget), "int32"),
                )
            )
            cache.bind(table, layer)
            self.padded = bind(T.floordiv(cache.table + (_PADDING - 1), _PADDING) * _PADDING)
            tasks = bind(tokens * spec.kv_heads)
            self.scores = T.alloc_buffer(
                (tasks * (self.padded * self.group),), "float32", scope="global"
            )
            self.ranks = T.alloc_buffer((tasks * self.padded,), "int32", scope="global")
            cache.check_reads(self.lengths, self.counts, self.length, WHOLE)
            scored = scoring(spec, cache, query, keys, tensor, self.scores)
            scored.check()
            with T.parallel(tasks) as task:
                self._task(task, scored)
        return result[0]

    def _task(self, task: Expr, scored: PageScores) -> None:
        spec = self.spec
        token, head = bind(T.floordiv(task, spec.kv_heads)), bind(T.floormod(task, spec.kv_heads))
        sequence, index = (
            bind(T.floordiv(token, self.length)),
            bind(T.floormod(token, self.length)),
        )
        count = bind(self.counts[sequence])
        newest = bind(T.floordiv(self.lengths[sequence] - count + index, PAGE))
        out = bind(((sequence * spec.kv_heads + head) * self.length + index) * spec.budget)
        read = bind(T.Select(index < count, newest + 1, T.int64(0)))

        def whole() -> None:
            with T.serial(T.int64(spec.budget)) as i:
                page = T.Select(i < read, T.Cast("int32", i), T.int32(-1))
                store(self.y, out + i, page, 1)

        def best() -> None:
            at, ranks = bind(task * (self.padded * self.group)), bind(task * self.padded)
            scored.score(sequence, token, head, newest, at, self.padded)
            self._rank(newest, at, ranks)
            self._choose(newest, ranks, out)
            store(self.y, out + (spec.budget - 1), T.Cast("int32", newest), 1)

        choose(True, read <= spec.budget, whole, best)

    def _rank(self, pages: Expr, scores: Expr, ranks: Expr) -> None:
        """Ranks of the pages before the newest, as integers; padding is lowest."""
        width, steps = self.width, self._steps(pages)
        best = []
        for head in range(self.group):
            first = bind(scores + head * self.padded)
            with T.serial(steps * width - pages) as rest:
                store(self.scores, first + pages + rest, T.float32(float("-inf")), 1)
            highest = Registers(1, width)
            highest[0] = splat(float("-inf"), width)
            with T.serial(steps) as step:
                highest[0] = T.max(highest[0], load(self.scores, first + step * width, width))
            best.append((first, bind(reduce_lanes(bind(highest[0]), width, T.max))))
        with T.serial(steps) as step:
            rank = None
            for first, highest in best:
                score = load(self.scores, first + step * width, width) - splat(highest, width)
                rank = bind(score if rank is None else T.max(rank, score))
            store(self.ranks, ranks + step * width, _ordered(rank, width), width)
        for first, count in (
            (T.int64(0), T.int64(self.spec.sinks)),
            (pages + 1 - self.spec.recent, T.int64(self.spec.recent - 1)),
        ):
            with T.serial(count) as forced:
                store(self.ranks, ranks + first + forced, T.int32(_HIGHEST), 1)

    def _choose(self, pages: Expr, ranks: Expr, out: Expr) -> None:
        """Writes all but the newest page; there are more candidates than places."""
        places = self.spec.budget - 1
        least = T.alloc_buffer((1,), "int64", scope="global")
        store(least, 0, T.int64(_LOWEST), 1)
        with T.serial(T.int64(32)) as bit:
            higher = bind(least[0] + (T.int64(1) << (T.int64(31) - bit)))
            enough = self._count(pages, ranks, higher, False) >= float(places)
            with T.If(enough), T.Then():
                store(least, 0, higher, 1)
        last = bind(least[0])
        left = T.alloc_buffer((2,), "int64", scope="global")
        above = T.Cast("int64", self._count(pages, ranks, last, True))
        store(left, 0, T.int64(places) - above, 1)
        store(left, 1, T.int64(0), 1)
        with T.serial(pages) as page:
            rank = bind(i64(self.ranks[ranks + page]))
            equal = T.And(rank == last, left[0] > 0)
            with T.If(T.Or(rank > last, equal)), T.Then():
                store(self.y, out + left[1], T.Cast("int32", page), 1)
                store(left, 1, left[1] + 1, 1)
                store(left, 0, left[0] - T.Select(rank == last, T.int64(1), T.int64(0)), 1)

    def _count(self, pages: Expr, ranks: Expr, least: Expr, strictly: bool) -> Expr:
        """How many ranks are at least, or above, a number; a float, exact."""
        width, bits = self.width, T.Cast("int32", least)
        bound = bind(T.Broadcast(bits, width) if width > 1 else bits)
        total = Registers(1, width)
        total[0] = splat(0.0, width)
        with T.serial(self._steps(pages)) as step:
            rank = load(self.ranks, ranks + step * width, width)
            counts = rank > bound if strictly else rank >= bound
            total[0] = total[0] + T.Select(counts, splat(1.0, width), splat(0.0, width))
        return bind(reduce_lanes(bind(total[0]), width, lambda a, b: a + b))

    def _steps(self, pages: Expr) -> Expr:
        return bind(T.floordiv(pages + (self.width - 1), self.width))


def _ordered(value: Expr, width: int) -> Expr:
    """Integers in the order of the floats: the bits below the sign turned for negative ones."""

    def spread(number: int) -> Expr:
        return T.Broadcast(T.int32(number), width) if width > 1 else T.int32(number)

    bits = bind(T.reinterpret(f"int32x{width}" if width > 1 else "int32", value))
    return bits ^ ((bits >> spread(31)) & spread(_HIGHEST))
