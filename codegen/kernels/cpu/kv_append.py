"""Writes the keys and values of new tokens into their pages.

    for sequence, page with new tokens:
      for kv head: keys[head, :, slots] = the tokens' keys; values[head, slots, :] = their values

Tokens in lanes whose group is just a page, as those of a prompt are, are copied as they lie for
keys and transposed in registers for values; other tokens go one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.lanes import transposed
from sparsify.codegen.kernels.cpu.paged_cache import PAGE, CacheOperands, page_count
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    Tensor,
    along,
    arguments,
    bind,
    choose,
    load,
    prim_func,
    share,
    store,
    symbol,
)
from sparsify.layouts import LANES, Form


@dataclass(frozen=True)
class KvAppend:
    """The kernel's specification.

    Attributes:
        features: features of the tensors that hold the keys and the values.
        offsets: where head 0 begins in each.
        form: of those tensors.
    """

    isa: Isa
    kv_heads: int
    head_dim: int
    features: tuple[int, int]
    offsets: tuple[int, int]
    form: Form

    @property
    def name(self) -> str:
        features = "_".join(f"{f}p{o}" for f, o in zip(self.features, self.offsets, strict=True))
        heads = f"h{self.kv_heads}_{self.head_dim}"
        return f"kv_append_{self.form}_{self.isa.name}_{heads}_{features}"

    def build(self) -> Any:
        """A PrimFunc ``(keys, values, key, value, pages, starts, counts, layer, length, lengths)``.

        Key and value are ``[batch * length, features]``, or that in lanes. It changes ``keys`` and
        ``values`` and fills ``lengths`` with ``starts + counts``.

        It fails, before it writes, when a page is not in the pool, a sequence is longer than its
        page table, or a start or a count is negative or too large.
        """
        return _Emitter(self).build()


class _Emitter:
    def __init__(self, spec: KvAppend) -> None:
        self.spec = spec
        self.cache = CacheOperands("kv_append", spec.kv_heads, spec.head_dim)

    def build(self) -> Any:
        spec, cache = self.spec, self.cache
        with prim_func(spec.name) as result:
            count = symbol()
            trailing = (LANES,) if spec.form == "lanes" else ()
            keys, values, pages = cache.tensors
            (
                self.keys, self.values, self.key, self.value, table,
                self.starts, self.counts, layer, self.length, lengths,
            ) = arguments(
                keys,
                values,
                Tensor("key", (count, spec.features[0], *trailing)),
                Tensor("value", (count, spec.features[1], *trailing)),
                pages,
                Tensor("starts", (cache.batch,), "int64"),
                Tensor("counts", (cache.batch,), "int64"),
                Integer("layer"),
                Integer("length"),
                Tensor("lengths", (cache.batch,), "int64"),
            )  # fmt: skip
            cache.bind(table, layer)
            cache.check_layer()
            with T.serial(cache.batch) as row:
                start, real = bind(self.starts[row]), bind(self.counts[row])
                cache.check_held(start)
                cache.check_counts(start, real, self.length)
                cache.check_pages(row, start, start + real)
                store(lengths, row, start + real, 1)
            # A row that begins in the midst of a page touches one page more.
            touched = bind(page_count(self.length) + 1)
            if spec.form == "lanes":
                with T.parallel(cache.batch * touched) as task:
                    self._page(task, touched)
            else:
                elements = cache.batch * self.length * (2 * spec.kv_heads * spec.head_dim)
                share(cache.batch * touched, elements, lambda task: self._page(task, touched))
        return result[0]

    def _page(self, task: Expr, touched: Expr) -> None:
        row = bind(T.floordiv(task, touched))
        start = bind(self.starts[row])
        end = bind(start + self.counts[row])
        page = bind(T.floordiv(start, PAGE) + T.floormod(task, touched))
        first, last = bind(T.max(start, page * PAGE)), bind(T.min(end, (page + 1) * PAGE))
        with T.If(first < last), T.Then():
            token = bind(row * self.length + (first - start))
            slot = bind(first - page * PAGE)
            with T.serial(T.int64(self.spec.kv_heads)) as head:
                at = bind(self.cache.block(row, page, head))
                self._head(at, head, token, slot, bind(last - first))

    def _head(self, at: Expr, head: Expr, token: Expr, slot: Expr, count: Expr) -> None:
        spec = self.spec
        key, value = (bind(offset + head * spec.head_dim) for offset in spec.offsets)
        if spec.form == "rows":
            self._rows(at, key, value, token, slot, count)
            return
        whole = T.And(count == PAGE, T.floormod(token, LANES) == 0)
        choose(
            True,
            whole,
            lambda: self._group(at, key, value, bind(T.floordiv(token, LANES))),
            lambda: self._lanes(at, key, value, token, slot, count),
        )

    def _rows(self, at: Expr, key: Expr, value: Expr, token: Expr, slot: Expr, count: Expr) -> None:
        spec = self.spec
        with T.serial(count) as i:
            source = bind((token + i) * spec.features[0] + key)
            with T.serial(T.int64(spec.head_dim)) as d:
                store(self.keys, at + d * PAGE + slot + i, self.key[source + d], 1)
            row = bind((token + i) * spec.features[1] + value)
            target = bind(at + (slot + i) * spec.head_dim)

            def run(d: Expr, width: int, row: Expr = row, target: Expr = target) -> None:
                store(self.values, target + d, load(self.value, row + d, width), width)

            along(spec.head_dim, spec.isa.vector, run)

    def _lanes(
        self, at: Expr, key: Expr, value: Expr, token: Expr, slot: Expr, count: Expr
    ) -> None:
        spec = self.spec
        with T.serial(count) as i:
            group, lane = bind(T.floordiv(token + i, LANES)), bind(T.floormod(token + i, LANES))
            k, v = (
                bind((group * features + feature) * LANES + lane)
                for features, feature in zip(spec.features, (key, value), strict=True)
            )
            with T.serial(T.int64(spec.head_dim)) as d:
                store(self.keys, at + d * PAGE + slot + i, self.key[k + d * LANES], 1)
            with T.serial(T.int64(spec.head_dim)) as d:
                target = at + (slot + i) * spec.head_dim + d
                store(self.values, target, self.value[v + d * LANES], 1)

    def _group(self, at: Expr, key: Expr, value: Expr, group: Expr) -> None:
        """A lane group that fills a page."""
        spec, width = self.spec, self.spec.isa.vector
        k, v = (
            bind((group * features + feature) * LANES)
            for features, feature in zip(spec.features, (key, value), strict=True)
        )
        with T.serial(T.int64(spec.head_dim * PAGE // width)) as step:
            store(self.keys, at + step * width, load(self.key, k + step * width, width), width)

        whole = spec.head_dim // width * width
        with T.serial(T.int64(PAGE // width)) as part, T.serial(T.int64(whole // width)) as step:
            source, target = (
                bind(v + step * (width * LANES) + part * width),
                bind(at + part * (width * spec.head_dim) + step * width),
            )
            columns = [bind(load(self.value, source + i * LANES, width)) for i in range(width)]
            for i, tokens in enumerate(transposed(columns, width)):
                store(self.values, target + i * spec.head_dim, tokens, width)
        with T.serial(T.int64(PAGE)) as i, T.serial(T.int64(spec.head_dim - whole)) as rest:
            d = bind(rest + whole)
            store(self.values, at + i * spec.head_dim + d, self.value[v + d * LANES + i], 1)
