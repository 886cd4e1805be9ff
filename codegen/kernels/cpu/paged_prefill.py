"""Attention of many new tokens over the paged cache: queries in lanes, keys and values in pages.

A tile of queries reads the keys from the first that any of them sees, by the window, up to the
last, by causality; pages outside are skipped, and where blocks of pages were selected, all others.
Queries that are padding give zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.band import Band
from sparsify.codegen.kernels.cpu.band import Reach, Visit
from sparsify.codegen.kernels.cpu.block_lists import KEYS_AT_ONCE
from sparsify.codegen.kernels.cpu.flash import FlashTiles
from sparsify.codegen.kernels.cpu.paged_cache import PAGE, CacheOperands, PagedAttention
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Tensor,
    bind,
    i64,
    in_name,
    prim_func,
    require,
    splat,
    symbol,
)
from sparsify.layouts import LANES


@dataclass(frozen=True)
class PagedPrefill(PagedAttention):
    """The kernel's specification.

    Attributes:
        vectors: query tile, in vectors.
        block: queries, and pages, of the blocks that lists name; None: all are read. A block of
            queries is made of whole tiles, and there is no window.
        skip: see `FlashTiles`.
    """

    vectors: int
    block: tuple[int, int] | None = None
    skip: float = 0.0

    @property
    def name(self) -> str:
        block = "" if self.block is None else f"_b{self.block[0]}_{self.block[1]}"
        skip = f"_s{in_name(self.skip)}" if self.skip else ""
        return f"paged_prefill_{self._suffix}_v{self.vectors}{block}{skip}"

    def build(self) -> Any:
        """A PrimFunc ``(query, keys, values, pages, lengths, counts[, selected], layer, length,
        y)``.

        Query and y are in lanes, selected is ``[batch, lists, query_blocks, most]``. It fails when
        a page that is seen is not in the pool, when a length or a count is impossible, or when a
        list names a block that begins after the sequence.
        """
        return _Emitter(self).build()


class _Emitter(FlashTiles):
    def __init__(self, spec: PagedPrefill) -> None:
        heads = (spec.heads, spec.kv_heads, spec.head_dim)
        place = (spec.features, spec.offset)
        super().__init__(spec.isa, heads, spec.vectors, *place, spec.scores, 1, spec.skip)
        self.spec = spec
        self.reach = Reach.of(Band(causal=True, window=spec.scores.window))
        self.cache = CacheOperands("paged_attention", spec.kv_heads, spec.head_dim)

    def build(self) -> Any:
        spec, cache = self.spec, self.cache
        with prim_func(spec.name) as result:
            self.groups = symbol()
            self.lists, self.rows, self.most = symbol(), symbol(), symbol()
            lists = (cache.batch, self.lists, self.rows, self.most)
            operands = cache.declare_reading(
                Tensor("query", (self.groups, spec.features, LANES)),
                Tensor("y", (self.groups, spec.heads * spec.head_dim, LANES)),
                None if spec.block is None else Tensor("selected", lists, "int32"),
            )
            self.query, self.key, self.value, self.lengths, self.counts, *rest = operands
            self.selected, self.queries, self.y = rest
            cache.check_reads(self.lengths, self.counts, self.queries, spec.scores)
            if spec.block is not None:
                require(
                    self.rows * spec.block[0] >= self.queries,
                    "paged_attention: there must be one list of selected blocks for each block of "
                    "queries",
                    "ValueError",
                )
            self.emit(cache.batch)
        return result[0]

    def each_block(self, sequence: Expr, head: Expr, kv_head: Expr, visit: Visit) -> None:
        self.sequence, self.kv_head = sequence, kv_head
        count = bind(self.counts[sequence])
        total = bind(self.lengths[sequence])
        self.real = bind(count - self.first)
        self.position = bind(total - self.real)
        end = bind(T.Select(self.real > 0, total, T.int64(0)))
        last = bind(self.position + (self.tile - 1))
        if self.spec.block is None:
            self.reach.each_block(self.position, last, end, KEYS_AT_ONCE, visit)
        else:
            self._each_listed(self.spec.block, head, last, end, visit)

    def _each_listed(
        self, block: tuple[int, int], head: Expr, last: Expr, end: Expr, visit: Visit
    ) -> None:
        size, visible = block[1] * PAGE, bind(T.min(end, last + 1))
        plane = self.sequence * self.lists + T.floordiv(head * self.lists, self.spec.heads)
        at = bind((plane * self.rows + T.floordiv(self.first, block[0])) * self.most)
        with T.serial(T.Select(self.real > 0, self.most, T.int64(0))) as number:
            listed = bind(i64(self.selected[at + number]))
            require(
                T.And(listed >= -1, listed * size < end),
                "paged_attention: a list of selected blocks names one that begins after the "
                "sequence; -1 stands behind the last",
            )
            begin = bind(listed * size)
            ahead = T.Select(listed >= 0, T.min(T.int64(size), visible - begin), T.int64(0))
            held = bind(T.max(ahead, T.int64(0)))
            with T.serial(T.floordiv(held + (KEYS_AT_ONCE - 1), KEYS_AT_ONCE)) as part:
                start = bind(begin + part * KEYS_AT_ONCE)
                count = bind(T.min(T.int64(KEYS_AT_ONCE), begin + held - start))
                visit(start, count, self.reach.rules(start, count, self.position, last))

    def key_place(self, key: Expr) -> Expr:
        return self._page(key) + T.floormod(key, PAGE)

    def value_place(self, key: Expr) -> Expr:
        return self._page(key) + T.floormod(key, PAGE) * self.spec.head_dim

    def _page(self, key: Expr) -> Expr:
        return self.cache.block(self.sequence, T.floordiv(key, PAGE), self.kv_head)

    def seen(self, score: Expr, key: Expr, vector: int) -> Expr:
        return self.reach.score(score, key, self.position + vector * self.width, self.width)

    def result(self, value: Expr, vector: int) -> Expr:
        lanes = T.Ramp(T.int64(vector * self.width), T.int64(1), self.width)
        padding = lanes >= T.Broadcast(self.real, self.width)
        return T.Select(padding, splat(0.0, self.width), value)
