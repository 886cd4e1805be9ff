"""Keeps the least and the largest of each feature of the keys of pages that have become full.

for sequence, page that the newest tokens filled, kv head:
  for feature: bounds[0, feature] = min over slots; bounds[1, feature] = max over slots
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.paged_cache import PAGE, WHOLE, CacheOperands
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    Tensor,
    arguments,
    bind,
    load,
    prim_func,
    reduce_lanes,
    share,
    store,
)


@dataclass(frozen=True)
class PageBounds:
    """The kernel's specification."""

    isa: Isa
    kv_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        return f"page_bounds_{self.isa.name}_h{self.kv_heads}_{self.head_dim}"

    def build(self) -> Any:
        """A PrimFunc ``(bounds, keys, pages, lengths, counts, layer, length, y)``.

        It changes ``bounds`` and copies ``lengths``; ``length`` bounds the counts. It fails, before
        it writes, when a page is not in the pool, or when a length or a count is impossible.
        """
        cache = CacheOperands("page_bounds", self.kv_heads, self.head_dim)
        with prim_func(self.name) as result:
            keys, _, pages = cache.tensors
            bounds, keys, table, lengths, counts, layer, length, y = arguments(
                cache.bounds,
                keys,
                pages,
                Tensor("lengths", (cache.batch,), "int64"),
                Tensor("counts", (cache.batch,), "int64"),
                Integer("layer"),
                Integer("length"),
                Tensor("y", (cache.batch,), "int64"),
            )
            cache.bind(table, layer)
            cache.check_reads(lengths, counts, length, WHOLE)
            with T.serial(cache.batch) as row:
                store(y, row, lengths[row], 1)
            # Tokens that begin in the midst of a page may fill one more than they would alone.
            touched = bind(T.floordiv(length, PAGE) + 1)

            def task(number: Expr) -> None:
                row = bind(T.floordiv(number, touched))
                total = bind(lengths[row])
                first = T.floordiv(total - counts[row], PAGE)
                page = bind(first + T.floormod(number, touched))
                filled = page < T.floordiv(total, PAGE)
                heads = bind(T.Select(filled, T.int64(self.kv_heads), T.int64(0)))
                with T.serial(heads) as head:
                    at = bind(cache.block(row, page, head))
                    self._page(keys, bounds, at, bind(cache.bounds_at(row, page, head)))

            elements = cache.batch * length * (self.kv_heads * self.head_dim)
            share(cache.batch * touched, elements, task)
        return result[0]

    def _page(self, keys: Expr, bounds: Expr, source: Expr, target: Expr) -> None:
        width = self.isa.vector
        with T.serial(T.int64(self.head_dim)) as d:
            at = bind(source + d * PAGE)
            parts = [bind(load(keys, at + p, width)) for p in range(0, PAGE, width)]
            for place, pick in ((target, T.min), (target + self.head_dim, T.max)):
                whole = parts[0]
                for part in parts[1:]:
                    whole = bind(pick(whole, part))
                store(bounds, place + d, reduce_lanes(whole, width, pick), 1)
