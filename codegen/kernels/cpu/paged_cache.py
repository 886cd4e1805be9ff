"""The paged cache as kernels see it: where a page lies, and the checks before anything is touched.

Keys are ``[layers, pages, kv_heads, head_dim, 16]``, values ``[layers, pages, kv_heads, 16,
head_dim]``: in one page and head, feature d of the key in slot s lies at ``d * 16 + s``, that of
the value at ``s * head_dim + d``.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.scores import Scores
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    Tensor,
    arguments,
    bind,
    i64,
    require,
    store,
    symbol,
)
from sparsify.layouts import LANES

PAGE = LANES
"""Tokens of a page."""


class CacheOperands:
    """The paged cache as parameters of one kernel.

    Attributes:
        batch, table: extents of the page table: sequences, and pages of each.
        tensors: the parameters ``keys, values, pages``, to be declared by the kernel.
        bounds: the least and the largest keys of pages, in so many ``parts`` of a page, for kernels
            that take them.
    """

    def __init__(self, kernel: str, kv_heads: int, head_dim: int, parts: int = 1) -> None:
        self._kernel = kernel
        self._kv_heads, self._head_dim, self._parts = kv_heads, head_dim, parts
        self._layers, self._pool = symbol(), symbol()
        self.batch, self.table = symbol(), symbol()
        leading = (self._layers, self._pool, kv_heads)
        self.tensors = (
            Tensor("keys", (*leading, head_dim, PAGE)),
            Tensor("values", (*leading, PAGE, head_dim)),
            Tensor("pages", (self.batch, self.table), "int32"),
        )
        self.bounds = Tensor("bounds", (*leading, 2, head_dim, parts))

    def declare_reading(
        self, query: Tensor, y: Tensor, selected: Tensor | None = None
    ) -> tuple[Expr, ...]:
        """The parameters of an attention over the cache.

        ``(query, keys, values, pages, lengths, counts[, selected], layer, length, y)``; all are
        returned but the page table and the layer, which are taken.
        """
        declared, keys, values, pages, lengths, counts, chosen, layer, length, out = arguments(
            query,
            *self.tensors,
            Tensor("lengths", (self.batch,), "int64"),
            Tensor("counts", (self.batch,), "int64"),
            selected,
            Integer("layer"),
            Integer("length"),
            y,
        )
        self.bind(pages, layer)
        return declared, keys, values, lengths, counts, chosen, length, out

    def bind(self, pages: Expr, layer: Expr) -> None:
        """Takes the declared page table and the layer."""
        self._pages, self._layer = pages, layer

    def block(self, sequence: Expr, page: Expr, head: Expr) -> Expr:
        """Offset of one head's keys, and of its values, in a page of a sequence."""
        return self._place(sequence, page, head) * (self._head_dim * PAGE)

    def bounds_at(self, sequence: Expr, page: Expr, head: Expr) -> Expr:
        """Offset of the least keys of a page's head; the largest lie behind them."""
        return self._place(sequence, page, head) * (2 * self._head_dim * self._parts)

    def _place(self, sequence: Expr, page: Expr, head: Expr) -> Expr:
        place = i64(self._pages[sequence * self.table + page])
        return (self._layer * self._pool + place) * self._kv_heads + head

    def check_layer(self) -> None:
        inside = T.And(self._layer >= 0, self._layer < self._layers)
        require(inside, f"{self._kernel}: the cache has no such layer; make it for all layers")

    def check_held(self, tokens: Expr) -> None:
        """A sequence holds so many tokens: no sum with a count can overflow afterwards."""
        require(
            tokens <= self.table * PAGE,
            f"{self._kernel}: {self._too_long}",
        )

    @property
    def _too_long(self) -> str:
        return (
            "a sequence is longer than its row of the page table holds, at "
            f"{PAGE} tokens a page; give it more pages"
        )

    def check_counts(self, before: Expr, count: Expr, length: Expr) -> None:
        """So many tokens of a row of ``length`` are real, and ``before`` came earlier."""
        require(
            T.And(count >= 0, T.And(count <= length, before >= 0)),
            f"{self._kernel}: counts must lie between 0 and the length of a row, and no sequence "
            "may hold fewer tokens than none",
            "ValueError",
        )

    def check_pages(self, sequence: Expr, first: Expr, end: Expr) -> None:
        """The pages of positions ``first`` up to ``end`` are in the table and in the pool."""
        self.check_held(end)
        begin = bind(T.floordiv(first, PAGE))
        with T.serial(T.max(page_count(end) - begin, T.int64(0))) as step:
            page = bind(i64(self._pages[sequence * self.table + begin + step]))
            require(
                T.And(page >= 0, page < self._pool),
                f"{self._kernel}: an entry of the page table is no page of the cache",
            )

    def check_reads(self, lengths: Expr, counts: Expr, length: Expr, scores: Scores) -> Expr:
        """Everything that attention reads; returns the most keys in pages that a query sees."""
        most = T.alloc_buffer((1,), "int64", scope="global")
        store(most, 0, T.int64(0), 1)
        self.check_layer()
        with T.serial(self.batch) as row:
            total, real = bind(lengths[row]), bind(counts[row])
            self.check_held(total)
            require(
                total >= 0, f"{self._kernel}: a sequence holds fewer tokens than none", "ValueError"
            )
            self.check_counts(total - real, real, length)
            low = bind(scores.lowest(total - real))
            self.check_pages(row, low, total)
            store(most, 0, T.max(most[0], total - T.floordiv(low, PAGE) * PAGE), 1)
        return bind(most[0])


def page_count(tokens: Expr) -> Expr:
    return T.floordiv(tokens + (PAGE - 1), PAGE)


WHOLE = Scores(1.0, 0, 0.0)
"""Of kernels that look at all keys and make no scores."""


@dataclass(frozen=True)
class PagedAttention:
    """What the specifications of attention over the cache have in common.

    Attributes:
        heads, kv_heads, head_dim: head ``h`` attends with key head ``h * kv_heads // heads``.
        features: features of the tensor that holds the query.
        offset: where head 0 begins there.
        scores: how scores are made and which keys are seen.
    """

    isa: Isa
    heads: int
    kv_heads: int
    head_dim: int
    features: int
    offset: int
    scores: Scores

    @property
    def _suffix(self) -> str:
        """Of the kernel's name."""
        heads = f"h{self.heads}_{self.kv_heads}_{self.head_dim}_{self.features}p{self.offset}"
        return f"{self.isa.name}_{heads}_{self.scores.name}"
