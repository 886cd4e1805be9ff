"""Attention of a few new tokens over the paged cache: bound by the reading of keys and values.

    for token, kv head, part of its keys (parallel):
      for block of pages:
        scores[query head, key] = q[head, :] . K[:, keys]           # keys of a page in lanes
        running maximum of each query head; weights = exp2(scores - maximum)
        out[head, :] = out[head, :] * exp2(old - new maximum) + weights[head, key] V[key, :]
    for token, head: the parts' outs together, each by its maximum, over the sum of weights

The query heads of one key head share every vector of keys and values that is loaded. The parts
let all threads work on one token; they depend on the lengths alone, so that results do not depend
on the number of threads. The block after is prefetched: pages follow each other in no order.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.math import Vector, exp2
from sparsify.codegen.kernels.cpu.paged_cache import (
    PAGE,
    PagedCache,
    Scores,
    page_count,
)
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    Registers,
    Tensor,
    along,
    arguments,
    bind,
    load,
    prefetch,
    prim_func,
    reduce_lanes,
    remainder,
    splat,
    store,
    symbol,
)
from sparsify.layouts import LANES

_BLOCK = 4
"""Pages whose scores are computed before their values are read."""

_PART = 16
"""Pages of a part: a multiple of `_BLOCK`."""

_SHARED = 4
"""Query heads that share a loaded vector; more would not fit the registers."""

_LOWEST = -3e38
"""Below every score."""


@dataclass(frozen=True)
class PagedDecode:
    """The kernel's specification.

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
    def name(self) -> str:
        heads = f"h{self.heads}_{self.kv_heads}_{self.head_dim}_{self.features}p{self.offset}"
        return f"paged_decode_{self.isa.name}_{heads}_{self.scores.name}"

    def build(self) -> Any:
        """A PrimFunc ``(query, keys, values, pages, lengths, counts, layer, length, y)``.

        Query and y are ``[batch * length, features]``. It fails when a page that is seen is not
        in the pool, or when a length or a count is impossible.
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
        self.cache = PagedCache("paged_attention", spec.kv_heads, spec.head_dim)

    def build(self) -> Any:
        spec, cache = self.spec, self.cache
        with prim_func(spec.name) as result:
            tokens = symbol()
            keys, values, pages = cache.tensors
            (
                self.query, self.keys, self.values, table,
                self.lengths, self.counts, layer, self.length, self.y,
            ) = arguments(
                Tensor("query", (tokens, spec.features)),
                keys,
                values,
                pages,
                Tensor("lengths", (cache.batch,), "int64"),
                Tensor("counts", (cache.batch,), "int64"),
                Integer("layer"),
                Integer("length"),
                Tensor("y", (tokens, spec.heads * spec.head_dim)),
            )  # fmt: skip
            cache.bind(table, layer)
            seen = cache.check_reads(self.lengths, self.counts, self.length, spec.scores)
            self.parts = bind(T.max(_divided(seen, _PART * PAGE), T.int64(1)))
            # Memory is taken where the function begins: its size can follow from extents only.
            most = T.floordiv(cache.table, _PART) + 1
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
        token, self.head = (
            bind(T.floordiv(row, spec.kv_heads)),
            bind(T.floormod(row, spec.kv_heads)),
        )
        self.sequence = bind(T.floordiv(token, self.length))
        index, count = bind(T.floormod(token, self.length)), bind(self.counts[self.sequence])
        position = bind(self.lengths[self.sequence] - count + index)
        # A query that is padding sees nothing.
        end = bind(T.Select(index < count, position + 1, T.int64(0)))
        self.low = bind(spec.scores.lowest(position))
        first = bind(T.floordiv(self.low, PAGE) + part * _PART)
        self.high = bind(T.min(end, (first + _PART) * PAGE))
        self.last = bind(T.max(page_count(end) - 1, T.int64(0)))
        self._begin(bind(token * spec.features + spec.offset))
        visible = bind(T.max(self.high - first * PAGE, T.int64(0)))
        with T.serial(_divided(visible, _BLOCK * PAGE)) as block:
            self._block(bind(first + block * _BLOCK))
        self._keep(bind(row * (self.group * self.parts) + part))

    def _begin(self, source: Expr) -> None:
        count = self.group * self.spec.head_dim
        self.q = T.alloc_buffer((count,), "float32", scope="local")
        self.out = T.alloc_buffer((count,), "float32", scope="local")
        self.weights = T.alloc_buffer((self.group * _BLOCK * PAGE,), "float32", scope="local")
        self.maximum, self.sum, self.rescale = (
            T.alloc_buffer((self.group,), "float32", scope="local") for _ in range(3)
        )
        source = bind(source + self.head * count)

        def begin(at: Expr, width: int) -> None:
            query = load(self.query, source + at, width)
            store(self.q, at, query * splat(self.spec.scores.factor, width), width)
            store(self.out, at, splat(0.0, width), width)

        along(count, self.width, begin)
        with T.serial(T.int64(self.group)) as head:
            store(self.maximum, head, T.float32(_LOWEST), 1)
            store(self.sum, head, T.float32(0.0), 1)

    def _keep(self, place: Expr) -> None:
        """Stores the part's results; all parts of a query head lie together."""
        dim = self.spec.head_dim
        with T.serial(T.int64(self.group)) as head:
            target = bind((place + head * self.parts) * self.partial)

            def keep(d: Expr, width: int) -> None:
                store(self.partials, target + d, load(self.out, head * dim + d, width), width)

            along(dim, self.width, keep)
            store(self.partials, target + dim, self.maximum[head], 1)
            store(self.partials, target + (dim + 1), self.sum[head], 1)

    def _put_together(self, row: Expr) -> None:
        """One query head: its parts' outs, weighted by their maxima, over the sum of weights."""
        dim = self.spec.head_dim
        first, target = bind(row * (self.parts * self.partial)), bind(row * dim)
        total = T.alloc_buffer((2,), "float32", scope="global")
        store(total, 0, T.float32(_LOWEST), 1)
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
            weight = exp2(Vector(self.partials[at + dim], 1) - Vector(highest, 1)).value
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

    def _block(self, page: Expr) -> None:
        """The pages from ``page`` on; those after the last repeat it, and are not seen."""
        places = T.alloc_buffer((2 * _BLOCK,), "int64", scope="global")
        for i in range(2 * _BLOCK):
            inside = bind(T.min(page + i, self.last))
            store(places, i, self.cache.block(self.sequence, inside, self.head), 1)
        position = bind(page * PAGE)
        self._each_heads(lambda head, heads: self._multiply(places, head, heads))
        with T.serial(T.int64(self.group)) as head:
            self._softmax(position, head)
        self._each_heads(lambda head, heads: self._accumulate(position, places, head, heads))

    def _each_heads(self, body: Callable[[Expr, int], None]) -> None:
        """Runs ``body(first head, heads)`` over the query heads, as many as share a load."""
        whole, rest = divmod(self.group, _SHARED)
        if whole:
            with T.serial(T.int64(whole)) as step:
                body(bind(step * _SHARED), _SHARED)
        if rest:
            body(T.int64(whole * _SHARED), rest)

    def _multiply(self, places: Expr, head: Expr, heads: int) -> None:
        """Products of a block's keys with the query."""
        width, parts, dim = self.width, self.spec.isa.vectors_per_group, self.spec.head_dim
        together = _power_of_two(self.spec.isa.registers // 2 // (heads * parts), _BLOCK)
        vectors = together * parts
        with T.serial(T.int64(_BLOCK // together)) as step:
            first = bind(step * together)
            at = [bind(places[first + i]) for i in range(together)]
            after = [bind(places[first + _BLOCK + i]) for i in range(together)]
            product = Registers(heads * vectors, width)
            for i in range(len(product)):
                product[i] = splat(0.0, width)
            with T.serial(T.int64(dim)) as d:
                for page in after:
                    prefetch(self.keys, page + d * PAGE)
                keys = [
                    bind(load(self.keys, page + d * PAGE + part * width, width))
                    for page in at
                    for part in range(parts)
                ]
                for h in range(heads):
                    q = bind(splat(self.q[(head + h) * dim + d], width))
                    for v, key in enumerate(keys):
                        product[h * vectors + v] = product[h * vectors + v] + key * q
            for h in range(heads):
                target = bind((head + h) * (_BLOCK * PAGE) + first * PAGE)
                for v in range(vectors):
                    store(self.weights, target + v * width, product[h * vectors + v], width)

    def _softmax(self, position: Expr, head: Expr) -> None:
        """A block's products of one query head into weights, by the maximum so far."""
        width, count = self.width, T.int64(_BLOCK * PAGE // self.width)
        first, old = bind(head * (_BLOCK * PAGE)), bind(self.maximum[head])
        kept = Registers(1, width)
        kept[0] = splat(old, width)
        with T.serial(count) as step:
            at = bind(first + step * width)
            score = self.spec.scores.value(load(self.weights, at, width), width)
            score = bind(self._seen(score, bind(position + step * width)))
            store(self.weights, at, score, width)
            kept[0] = T.max(kept[0], score)
        new = reduce_lanes(bind(kept[0]), width, T.max)
        kept[0] = splat(0.0, width)
        with T.serial(count) as step:
            at = bind(first + step * width)
            weight = exp2(Vector(load(self.weights, at, width) - splat(new, width), width)).value
            store(self.weights, at, weight, width)
            kept[0] = kept[0] + weight
        total = reduce_lanes(bind(kept[0]), width, _plus)
        rescale = exp2(Vector(old, 1) - Vector(new, 1)).value
        store(self.maximum, head, new, 1)
        store(self.rescale, head, rescale, 1)
        store(self.sum, head, self.sum[head] * rescale + total, 1)

    def _seen(self, score: Expr, key: Expr) -> Expr:
        lanes = T.Ramp(key, T.int64(1), self.width)
        hidden = splat(T.float32(float("-inf")), self.width)
        score = T.Select(lanes >= T.Broadcast(self.high, self.width), hidden, score)
        if self.spec.scores.window:
            score = T.Select(lanes < T.Broadcast(self.low, self.width), hidden, score)
        return score

    def _accumulate(self, position: Expr, places: Expr, head: Expr, heads: int) -> None:
        dim, width = self.spec.head_dim, self.width
        vectors = _power_of_two(self.spec.isa.registers // 2 // heads, 8)
        tile = vectors * width

        def features(first: Expr, count: int, lanes: int) -> None:
            self._accumulate_tile(position, places, head, heads, first, count, lanes)

        if dim >= tile:
            with T.serial(T.int64(dim // tile)) as step:
                features(bind(step * tile), vectors, width)
        if dim % tile >= width:
            features(T.int64(dim // tile * tile), dim % tile // width, width)
        for first, lanes in remainder(dim, width):
            features(T.int64(first), 1, lanes)

    def _accumulate_tile(
        self,
        position: Expr,
        places: Expr,
        head: Expr,
        heads: int,
        first: Expr,
        vectors: int,
        width: int,
    ) -> None:
        """out = out * rescale + weights V, for ``vectors`` vectors of features of each head."""
        dim = self.spec.head_dim
        out = [bind((head + h) * dim + first) for h in range(heads)]
        total = Registers(heads * vectors, width)
        for h in range(heads):
            scale = bind(splat(self.rescale[head + h], width))
            for v in range(vectors):
                total[h * vectors + v] = load(self.out, out[h] + v * width, width) * scale
        with T.serial(T.int64(_BLOCK)) as page:
            place, after = bind(places[page] + first), bind(places[page + _BLOCK] + first)
            start = bind(position + page * PAGE)
            begin = bind(T.max(self.low - start, T.int64(0)))
            # Slots that are not seen may hold anything, and nothing times NaN is NaN.
            with T.serial(T.max(T.min(self.high - start, T.int64(PAGE)) - begin, T.int64(0))) as i:
                slot = bind(begin + i)
                for line in range(0, vectors * width, LANES):
                    prefetch(self.values, after + slot * dim + line)
                value = [
                    bind(load(self.values, place + slot * dim + v * width, width))
                    for v in range(vectors)
                ]
                for h in range(heads):
                    at = (head + h) * (_BLOCK * PAGE) + page * PAGE + slot
                    weight = bind(splat(self.weights[at], width))
                    for v in range(vectors):
                        total[h * vectors + v] = total[h * vectors + v] + value[v] * weight
        for h in range(heads):
            for v in range(vectors):
                store(self.out, out[h] + v * width, total[h * vectors + v], width)


def _divided(count: Expr, size: int) -> Expr:
    """Rounded up."""
    return T.floordiv(count + (size - 1), size)


def _power_of_two(limit: int, most: int) -> int:
    """The greatest that is neither over ``limit`` nor over ``most``; at least one."""
    return 1 << (max(min(limit, most), 1).bit_length() - 1)


def _plus(a: Expr, b: Expr) -> Expr:
    return a + b
