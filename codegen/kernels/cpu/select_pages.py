"""Chooses the pages that new tokens read: the kernel family of all selectors.

for token, kv head, segment of the pages (parallel):
  for page, query head: score                                 # page_scores.py
for token, kv head (parallel):
  rank of a page = largest over query heads of score
  the pages of the highest ranks, ascending                   # top_ranks.py
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.page_scores import SCORINGS, PageScores
from sparsify.codegen.kernels.cpu.paged_cache import PAGE, WHOLE, CacheOperands
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    Tensor,
    arguments,
    bind,
    choose,
    load,
    prim_func,
    store,
    symbol,
)
from sparsify.codegen.kernels.cpu.top_ranks import PADDING, TopRanks
from sparsify.selectors import Scoring

SEGMENTS = 4
"""Parts of a token's pages that threads score apart: there are few key heads."""


@dataclass(frozen=True)
class SelectPages:
    """The kernel's specification.

    Attributes:
        heads, kv_heads, head_dim: head ``h`` attends with key head ``h * kv_heads // heads``.
        features: features of the tensor that holds the query, where head 0 begins at ``offset``.
        scoring: how a page is scored.
        channels: features of each key head that are read, None for all.
        parts: of a page, each with bounds of its own; 1 without bounds.
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
    parts: int
    budget: int
    sinks: int
    recent: int

    @property
    def name(self) -> str:
        heads = f"h{self.heads}_{self.kv_heads}_{self.head_dim}_{self.features}p{self.offset}"
        pages = f"{self.budget}_{self.sinks}_{self.recent}"
        channels = "" if self.channels is None else f"c{self.channels}"
        scoring = f"{self.scoring}{self.parts}{channels}"
        return f"select_pages_{scoring}_{self.isa.name}_{heads}_{pages}"

    def build(self) -> Any:
        """A PrimFunc ``(query, keys[, tensor], pages, lengths, counts, layer, length, y)``.

        Query is ``[batch * length, features]``. It fails when a page that a sequence holds is not
        in the pool, a channel is no feature, or a length or a count is impossible.
        """
        return _Emitter(self).build()


class _Task(NamedTuple):
    """What is chosen for: a key head of a token.

    Attributes:
        index: of the token among the new ones of its sequence.
        newest: the token's own page; ``read``: how many pages it sees, 0 if it is padding.
    """

    sequence: Expr
    token: Expr
    head: Expr
    index: Expr
    newest: Expr
    read: Expr


class _Emitter:
    def __init__(self, spec: SelectPages) -> None:
        self.spec = spec
        self.width = spec.isa.vector
        self.group = spec.heads // spec.kv_heads
        self.cache = CacheOperands("select_pages", spec.kv_heads, spec.head_dim, spec.parts)

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
                    scoring.operand(spec, cache),
                    pages,
                    Tensor("lengths", (cache.batch,), "int64"),
                    Tensor("counts", (cache.batch,), "int64"),
                    Integer("layer"),
                    Integer("length"),
                    Tensor("y", (cache.batch, spec.kv_heads, symbol(), spec.budget), "int32"),
                )
            )
            cache.bind(table, layer)
            self.padded = bind(T.floordiv(cache.table + (PADDING - 1), PADDING) * PADDING)
            tasks = bind(tokens * spec.kv_heads)
            self.scores = T.alloc_buffer(
                (tasks * (self.padded * self.group),), "float32", scope="global"
            )
            self.ranks = T.alloc_buffer((tasks * self.padded,), "int32", scope="global")
            segments = bind(tasks * SEGMENTS)
            scored = scoring(spec, cache, query, keys, tensor, self.scores)
            scored.allocate(segments)
            cache.check_reads(self.lengths, self.counts, self.length, WHOLE)
            scored.check()
            with T.parallel(segments) as number:
                self._score(number, scored)
            with T.parallel(tasks) as task:
                self._choose(task)
        return result[0]

    def _task(self, task: Expr) -> _Task:
        spec = self.spec
        token, head = bind(T.floordiv(task, spec.kv_heads)), bind(T.floormod(task, spec.kv_heads))
        sequence, index = (
            bind(T.floordiv(token, self.length)),
            bind(T.floormod(token, self.length)),
        )
        count = bind(self.counts[sequence])
        newest = bind(T.floordiv(self.lengths[sequence] - count + index, PAGE))
        read = bind(T.Select(index < count, newest + 1, T.int64(0)))
        return _Task(sequence, token, head, index, newest, read)

    def _score(self, number: Expr, scored: PageScores) -> None:
        """Of one segment of the pages that a token sees, if it cannot read them all."""
        task, segment = bind(T.floordiv(number, SEGMENTS)), bind(T.floormod(number, SEGMENTS))
        of = self._task(task)
        first = bind(T.floordiv(of.newest * segment, SEGMENTS))
        end = bind(T.floordiv(of.newest * (segment + 1), SEGMENTS))
        at = bind(task * (self.padded * self.group))
        with T.If(T.And(of.read > self.spec.budget, first < end)), T.Then():
            scored.score(number, of.sequence, of.token, of.head, first, end, at, self.padded)

    def _choose(self, task: Expr) -> None:
        spec = self.spec
        of = self._task(task)
        row = (of.sequence * spec.kv_heads + of.head) * self.length + of.index
        out = bind(row * spec.budget)

        def whole() -> None:
            with T.serial(T.int64(spec.budget)) as i:
                page = T.Select(i < of.read, T.Cast("int32", i), T.int32(-1))
                store(self.y, out + i, page, 1)

        def best() -> None:
            at = bind(task * (self.padded * self.group))
            ranked = TopRanks(self.ranks, bind(task * self.padded), of.newest, self.width)
            self._rank(ranked, at)
            # The newest page is not ranked; it is read.
            ranked.each(
                T.int64(spec.budget - 1),
                lambda place, page: store(self.y, out + place, T.Cast("int32", page), 1),
            )
            store(self.y, out + (spec.budget - 1), T.Cast("int32", of.newest), 1)

        choose(True, of.read <= spec.budget, whole, best)

    def _rank(self, ranked: TopRanks, scores: Expr) -> None:
        """The largest of the heads' scores, and above them what is always read."""
        first = [bind(scores + head * self.padded) for head in range(self.group)]

        def rank(offset: Expr) -> Expr:
            return reduce(T.max, (load(self.scores, at + offset, self.width) for at in first))

        ranked.put(rank)
        ranked.force(T.int64(0), T.int64(self.spec.sinks))
        ranked.force(ranked.count + 1 - self.spec.recent, T.int64(self.spec.recent - 1))
