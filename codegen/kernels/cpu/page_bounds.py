"""Keeps the least and the largest of each feature of the keys of pages that have become full.

for sequence, page that the newest tokens filled, kv head:
  for feature, part: bounds[0, feature, part] = min over its slots; bounds[1, ...] = max
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
    fold_neighbours,
    load,
    prim_func,
    share,
    store,
)


@dataclass(frozen=True)
class PageBounds:
    """The kernel's specification.

    Attributes:
        parts: of a page, each with bounds of its own: 1, 2 or 4.
    """

    isa: Isa
    kv_heads: int
    head_dim: int
    parts: int

    @property
    def name(self) -> str:
        return f"page_bounds_{self.isa.name}_h{self.kv_heads}_{self.head_dim}_{self.parts}"

    def build(self) -> Any:
        """A PrimFunc ``(bounds, keys, pages, lengths, counts, layer, length, y)``.

        It changes ``bounds`` and copies ``lengths``; ``length`` bounds the counts. It fails, before
        it writes, when a page is not in the pool, or when a length or a count is impossible.
        """
        cache = CacheOperands("page_bounds", self.kv_heads, self.head_dim, self.parts)
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
        width, slots = self.isa.vector, PAGE // self.parts
        # Vectors of one part, or parts of one vector.
        vectors, lanes = max(slots // width, 1), max(width // slots, 1)
        with T.serial(T.int64(self.head_dim)) as d:
            at = bind(source + d * PAGE)
            loaded = [bind(load(keys, at + p, width)) for p in range(0, PAGE, width)]
            of_parts = [loaded[i : i + vectors] for i in range(0, len(loaded), vectors)]
            for first, pick in ((target, T.min), (target + self.head_dim * self.parts, T.max)):
                place = bind(first + d * self.parts)
                for number, part in enumerate(of_parts):
                    whole = part[0]
                    for vector in part[1:]:
                        whole = bind(pick(whole, vector))
                    found = fold_neighbours(whole, width, lanes, pick)
                    store(bounds, place + number * lanes, found, lanes)
