"""Attention of a few new tokens over the paged cache: bound by the reading of keys and values.

    for token, kv head, part of its keys (parallel):
      for block of pages: scores, running maximum, weights, out   # paged_heads.py
    for token, head: the parts' outs together, each by its maximum, over the sum of weights

The parts let all threads work on one token; they depend on the lengths alone, so that results do
not depend on the number of threads. Where pages were selected, those of a list follow each other as
if they were the whole sequence, its newest page being the last.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.math import Vector, exp2
from sparsify.codegen.kernels.cpu.paged_cache import PAGE, CacheOperands, PagedAttention
from sparsify.codegen.kernels.cpu.paged_heads import BLOCK, LOWEST, QueryHeads
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Tensor,
    along,
    bind,
    i64,
    load,
    prim_func,
    require,
    splat,
    store,
    symbol,
)

_PART = 16
"""Pages of a part: a multiple of `BLOCK`."""


@dataclass(frozen=True)
class PagedDecode(PagedAttention):
    """The kernel's specification.

    Attributes:
        selected: whether pages are listed, for each token and key head; there is no window then.
    """

    selected: bool = False

    @property
    def name(self) -> str:
        return f"paged_decode_{'selected_' * self.selected}{self._suffix}"

    def build(self) -> Any:
        """A PrimFunc ``(query, keys, values, pages, lengths, counts[, selected], layer, length,
        y)``.

        Query and y are ``[batch * length, features]``, selected ``[batch, kv_heads, length,
        most]``. It fails when a page that is seen is not in the pool, when a length or a count is
        impossible, or when a list of pages is not ascending or goes past the query's own.
        """
        return _Emitter(self).build()


class _Emitter:
    """Emits the kernel; ``group`` query heads have one kv head.

    A part's result of one query head is ``partial`` floats: its out, maximum and sum of weights.
    """

    def __init__(self, spec: PagedDecode) -> None:
        self.spec = spec
        self.width = spec.isa.vector
        self.group = spec.heads // spec.kv_heads
        self.partial = spec.head_dim + 2
        self.cache = CacheOperands("paged_attention", spec.kv_heads, spec.head_dim)

    def build(self) -> Any:
        spec, cache = self.spec, self.cache
        with prim_func(spec.name) as result:
            tokens = symbol()
            width = self.most = symbol()
            lists = (cache.batch, spec.kv_heads, symbol(), width)
            operands = cache.declare_reading(
                Tensor("query", (tokens, spec.features)),
                Tensor("y", (tokens, spec.heads * spec.head_dim)),
                Tensor("selected", lists, "int32") if spec.selected else None,
            )
            self.query, self.keys, self.values, self.lengths, self.counts, *rest = operands
            self.selected, self.length, self.y = rest
            seen = cache.check_reads(self.lengths, self.counts, self.length, spec.scores)
            most = T.floordiv(width if spec.selected else cache.table, _PART) + 1
            if spec.selected:
                self._check_lists()
                seen = width * PAGE
            self.parts = bind(T.max(_divided(seen, _PART * PAGE), T.int64(1)))
            # Memory is taken where the function begins: its size can follow from extents only.
            size = tokens * most * (spec.heads * self.partial)
            self.partials = T.alloc_buffer((size,), "float32", scope="global")
            with T.parallel(tokens * self.parts * spec.kv_heads) as task:
                self._part(task)
            with T.serial(tokens * spec.heads) as row:
                self._put_together(row)
        return result[0]

    def _part(self, task: Expr) -> None:
        """One token and kv head, over one part of the pages that the token sees."""
        spec = self.spec
        row, part = bind(T.floordiv(task, self.parts)), bind(T.floormod(task, self.parts))
        token = bind(T.floordiv(row, spec.kv_heads))
        head = bind(T.floormod(row, spec.kv_heads))
        sequence = bind(T.floordiv(token, self.length))
        index, count = bind(T.floormod(token, self.length)), bind(self.counts[sequence])
        position = bind(self.lengths[sequence] - count + index)
        # A query that is padding sees nothing.
        end = bind(T.Select(index < count, position + 1, T.int64(0)))
        low = bind(spec.scores.lowest(position))
        if spec.selected:
            at = bind(self._list(sequence, head, index))
            end = self._listed_keys(at, end)

        def block(number: Expr) -> Expr:
            page = i64(self.selected[at + number]) if spec.selected else number
            return self.cache.block(sequence, page, head)

        first = bind(T.floordiv(low, PAGE) + part * _PART)
        high = bind(T.min(end, (first + _PART) * PAGE))
        heads = QueryHeads(spec, self.query, self.keys, self.values)
        heads.begin(
            block,
            head,
            bind(token * spec.features + spec.offset),
            low,
            high,
            end,
        )
        visible = bind(T.max(high - first * PAGE, T.int64(0)))
        with T.serial(_divided(visible, BLOCK * PAGE)) as number:
            heads.attend(bind(first + number * BLOCK))
        self._keep(heads, bind(row * (self.group * self.parts) + part))

    def _list(self, sequence: Expr, head: Expr, index: Expr) -> Expr:
        """Offset of the list of a query's key head."""
        return ((sequence * self.spec.kv_heads + head) * self.length + index) * self.most

    def _listed_keys(self, at: Expr, end: Expr) -> Expr:
        """How many keys the listed pages hold for a query that sees the keys before ``end``."""
        total = T.alloc_buffer((1,), "int64", scope="global")
        store(total, 0, T.int64(0), 1)
        with T.serial(self.most) as number:
            page = bind(i64(self.selected[at + number]))
            with T.If(page >= 0), T.Then():
                store(total, 0, total[0] + T.min(T.int64(PAGE), end - page * PAGE), 1)
        return bind(T.max(total[0], T.int64(0)))

    def _check_lists(self) -> None:
        """Pages in lists are ascending and none is after the query's own."""
        spec = self.spec
        before = T.alloc_buffer((1,), "int64", scope="global")
        with T.serial(self.cache.batch * spec.kv_heads * self.length) as row:
            index = bind(T.floormod(row, self.length))
            sequence = bind(T.floordiv(row, self.length * spec.kv_heads))
            count = bind(self.counts[sequence])
            position = bind(self.lengths[sequence] - count + index)
            last = bind(T.Select(index < count, T.floordiv(position, PAGE), T.int64(-1)))
            store(before, 0, T.int64(-1), 1)
            with T.serial(self.most) as number:
                page = bind(i64(self.selected[row * self.most + number]))
                require(
                    T.Or(T.And(page > before[0], page <= last), page == -1),
                    "paged_attention: selected pages must be ascending, -1 behind the last, and "
                    "none after the query's own",
                )
                store(before, 0, T.Select(page == -1, last + 1, page), 1)

    def _keep(self, heads: QueryHeads, place: Expr) -> None:
        """Stores the part's results; all parts of a query head lie together."""
        dim = self.spec.head_dim
        with T.serial(T.int64(self.group)) as head:
            target = bind((place + head * self.parts) * self.partial)

            def keep(d: Expr, width: int) -> None:
                store(self.partials, target + d, load(heads.out, head * dim + d, width), width)

            along(dim, self.width, keep)
            store(self.partials, target + dim, heads.maximum[head], 1)
            store(self.partials, target + (dim + 1), heads.sum[head], 1)

    def _put_together(self, row: Expr) -> None:
        """One query head: its parts' outs, weighted by their maxima, over the sum of weights."""
        dim = self.spec.head_dim
        first, target = bind(row * (self.parts * self.partial)), bind(row * dim)
        total = T.alloc_buffer((2,), "float32", scope="global")
        store(total, 0, T.float32(LOWEST), 1)
        store(total, 1, T.float32(0.0), 1)

        def clear(d: Expr, width: int) -> None:
            store(self.y, target + d, splat(0.0, width), width)

        along(dim, self.width, clear)
        with T.serial(self.parts) as part:
            at = bind(first + part * self.partial + dim)
            store(total, 0, T.max(total[0], self.partials[at]), 1)
        highest = bind(total[0])
        with T.serial(self.parts) as part:
            at = bind(first + part * self.partial)
            weight = exp2(Vector(self.partials[at + dim] - highest, 1, self.spec.isa)).value
            store(total, 1, total[1] + weight * self.partials[at + (dim + 1)], 1)

            def add(d: Expr, width: int) -> None:
                value = load(self.partials, at + d, width) * splat(weight, width)
                store(self.y, target + d, load(self.y, target + d, width) + value, width)

            along(dim, self.width, add)
        # Nothing was seen: zeros.
        inverse = bind(
            T.Select(total[1] > T.float32(1e-30), T.float32(1.0) / total[1], T.float32(0.0))
        )

        def divide(d: Expr, width: int) -> None:
            store(
                self.y, target + d, load(self.y, target + d, width) * splat(inverse, width), width
            )

        along(dim, self.width, divide)


def _divided(count: Expr, size: int) -> Expr:
    """Rounded up."""
    return T.floordiv(count + (size - 1), size)
