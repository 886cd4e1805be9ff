"""Attention of many new tokens over the paged cache: queries in lanes, keys and values in pages.

A tile of queries reads the keys from the first that any of them sees, by the window, up to the
last, by causality; pages outside are skipped. Queries that are padding give zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.flash import FlashTiles
from sparsify.codegen.kernels.cpu.paged_cache import PAGE, CacheOperands, PagedAttention
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Tensor,
    bind,
    prim_func,
    splat,
    symbol,
)
from sparsify.layouts import LANES


@dataclass(frozen=True)
class PagedPrefill(PagedAttention):
    """The kernel's specification.

    Attributes:
        vectors: query tile, in vectors.
    """

    vectors: int

    @property
    def name(self) -> str:
        return f"paged_prefill_{self._suffix}_v{self.vectors}"

    def build(self) -> Any:
        """A PrimFunc ``(query, keys, values, pages, lengths, counts, layer, length, y)``.

        Query and y are in lanes. It fails when a page that is seen is not in the pool, or when a
        length or a count is impossible.
        """
        return _Emitter(self).build()


class _Emitter(FlashTiles):
    def __init__(self, spec: PagedPrefill) -> None:
        heads = (spec.heads, spec.kv_heads, spec.head_dim)
        factor = spec.scores.factor
        super().__init__(spec.isa, heads, spec.vectors, spec.features, spec.offset, factor, 1)
        self.spec = spec
        self.cache = CacheOperands("paged_attention", spec.kv_heads, spec.head_dim)

    def build(self) -> Any:
        spec, cache = self.spec, self.cache
        with prim_func(spec.name) as result:
            self.groups = symbol()
            operands = cache.declare_reading(
                Tensor("query", (self.groups, spec.features, LANES)),
                Tensor("y", (self.groups, spec.heads * spec.head_dim, LANES)),
            )
            self.query, self.key, self.value, self.lengths, self.counts, *rest = operands
            self.queries, self.y = rest
            cache.check_reads(self.lengths, self.counts, self.queries, spec.scores)
            self.emit(cache.batch)
        return result[0]

    def keys_of_tile(self, sequence: Expr, head: Expr, kv_head: Expr) -> tuple[Expr, Expr]:
        self.sequence, self.kv_head = sequence, kv_head
        count = bind(self.counts[sequence])
        total = bind(self.lengths[sequence])
        self.real = bind(count - self.first)
        self.position = bind(total - self.real)
        end = T.min(total, self.position + self.tile)
        begin = bind(self.spec.scores.lowest(self.position))
        return begin, bind(T.Select(self.real > 0, end, T.int64(0)))

    def key_place(self, key: Expr) -> Expr:
        return self._page(key) + T.floormod(key, PAGE)

    def value_place(self, key: Expr) -> Expr:
        return self._page(key) + T.floormod(key, PAGE) * self.spec.head_dim

    def _page(self, key: Expr) -> Expr:
        return self.cache.block(self.sequence, T.floordiv(key, PAGE), self.kv_head)

    def score(self, product: Expr, key: Expr, vector: int) -> Expr:
        width, scores = self.width, self.spec.scores
        score = scores.value(product, width, self.spec.isa)
        hidden = splat(T.float32(float("-inf")), width)
        behind = T.Broadcast(key, width)
        lanes = T.Ramp(self.position + vector * width, T.int64(1), width)
        score = T.Select(behind > lanes, hidden, score)
        if scores.window:
            lanes = T.Ramp(self.position + (vector * width - scores.window), T.int64(1), width)
            score = T.Select(behind <= lanes, hidden, score)
        return score

    def result(self, value: Expr, vector: int) -> Expr:
        lanes = T.Ramp(T.int64(vector * self.width), T.int64(1), self.width)
        padding = lanes >= T.Broadcast(self.real, self.width)
        return T.Select(padding, splat(0.0, self.width), value)
