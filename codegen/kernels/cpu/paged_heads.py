"""The query heads of one key head, on their way through the keys of a sequence.

    for block of pages:
      scores[query head, key] = q[head, :] . K[:, keys]           # keys of a page in lanes
      running maximum of each query head; weights = exp2(scores - maximum)
      out[head, :] = out[head, :] * exp2(old - new maximum) + weights[head, key] V[key, :]

All query heads share every vector of keys and values that is loaded. The block after is prefetched:
pages follow each other in no order.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.math import Vector, exp2
from sparsify.codegen.kernels.cpu.paged_cache import PAGE, PagedAttention, page_count
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    along,
    bind,
    load,
    prefetch,
    reduce_lanes,
    remainder,
    splat,
    store,
)
from sparsify.layouts import LANES

BLOCK = 4
"""Pages whose scores are computed before their values are read."""

LOWEST = -3e38
"""Below every score."""

_SHARED = 4
"""Query heads that share a loaded vector; more would not fit the registers."""


class QueryHeads:
    """The state of ``group`` query heads, and what a block of keys does to it.

    Attributes:
        out: float32 ``[group, head_dim]``, values by the weights so far.
        maximum, sum: float32 ``[group]``: of the scores so far, and of their weights.
    """

    def __init__(self, spec: PagedAttention, query: Expr, keys: Expr, values: Expr) -> None:
        self.spec = spec
        self.query, self.keys, self.values = query, keys, values
        self.width = spec.isa.vector
        self.group = spec.heads // spec.kv_heads

    def begin(
        self,
        block: Callable[[Expr], Expr],
        head: Expr,
        source: Expr,
        low: Expr,
        high: Expr,
        end: Expr,
    ) -> None:
        """Reads the queries of key head ``head`` of a sequence; nothing is seen yet.

        Args:
            block: offset of the head's keys, and of its values, in a page.
            source: where head 0 of the queries begins.
            low, high: the keys that are seen: from ``low``, before ``high``.
            end: of the sequence; what comes before it is prefetched.
        """
        self.block, self.head, self.low, self.high = block, head, low, high
        self.last = bind(T.max(page_count(end) - 1, T.int64(0)))
        count = self.group * self.spec.head_dim
        self.q = T.alloc_buffer((count,), "float32", scope="local")
        self.out = T.alloc_buffer((count,), "float32", scope="local")
        self.weights = T.alloc_buffer((self.group * BLOCK * PAGE,), "float32", scope="local")
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
            store(self.maximum, head, T.float32(LOWEST), 1)
            store(self.sum, head, T.float32(0.0), 1)

    def attend(self, page: Expr) -> None:
        """The block of pages from ``page``; those after the last repeat it, and are not seen."""
        places = T.alloc_buffer((2 * BLOCK,), "int64", scope="global")
        for i in range(2 * BLOCK):
            inside = bind(T.min(page + i, self.last))
            store(places, i, self.block(inside), 1)
        position = bind(page * PAGE)
        each_heads(self.group, lambda head, heads: self._multiply(places, head, heads))
        with T.serial(T.int64(self.group)) as head:
            self._softmax(position, head)
        each_heads(self.group, lambda head, heads: self._accumulate(position, places, head, heads))

    def _multiply(self, places: Expr, head: Expr, heads: int) -> None:
        """Products of a block's keys with the query."""
        width, parts, dim = self.width, self.spec.isa.vectors_per_group, self.spec.head_dim
        together = _power_of_two(self.spec.isa.registers // 2 // (heads * parts), BLOCK)
        vectors = together * parts
        with T.serial(T.int64(BLOCK // together)) as step:
            first = bind(step * together)
            at = [bind(places[first + i]) for i in range(together)]
            after = [bind(places[first + BLOCK + i]) for i in range(together)]
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
                target = bind((head + h) * (BLOCK * PAGE) + first * PAGE)
                for v in range(vectors):
                    store(self.weights, target + v * width, product[h * vectors + v], width)

    def _softmax(self, position: Expr, head: Expr) -> None:
        """A block's products of one query head into weights, by the maximum so far."""
        width, count = self.width, T.int64(BLOCK * PAGE // self.width)
        first, old = bind(head * (BLOCK * PAGE)), bind(self.maximum[head])
        kept = Registers(1, width)
        kept[0] = splat(old, width)
        with T.serial(count) as step:
            at = bind(first + step * width)
            score = self.spec.scores.value(load(self.weights, at, width), width, self.spec.isa)
            score = bind(self._seen(score, bind(position + step * width)))
            store(self.weights, at, score, width)
            kept[0] = T.max(kept[0], score)
        new = reduce_lanes(bind(kept[0]), width, T.max)
        kept[0] = splat(0.0, width)
        with T.serial(count) as step:
            at = bind(first + step * width)
            power = load(self.weights, at, width) - splat(new, width)
            weight = exp2(Vector(power, width, self.spec.isa)).value
            store(self.weights, at, weight, width)
            kept[0] = kept[0] + weight
        total = reduce_lanes(bind(kept[0]), width, _plus)
        rescale = exp2(Vector(old - new, 1, self.spec.isa)).value
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
        with T.serial(T.int64(BLOCK)) as page:
            place, after = bind(places[page] + first), bind(places[page + BLOCK] + first)
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
                    at = (head + h) * (BLOCK * PAGE) + page * PAGE + slot
                    weight = bind(splat(self.weights[at], width))
                    for v in range(vectors):
                        total[h * vectors + v] = total[h * vectors + v] + value[v] * weight
        for h in range(heads):
            for v in range(vectors):
                store(self.out, out[h] + v * width, total[h * vectors + v], width)


def each_heads(group: int, body: Callable[[Expr, int], None]) -> None:
    """Runs ``body(first head, heads)`` over the query heads, as many as share a load."""
    whole, rest = divmod(group, _SHARED)
    if whole:
        with T.serial(T.int64(whole)) as step:
            body(bind(step * _SHARED), _SHARED)
    if rest:
        body(T.int64(whole * _SHARED), rest)


def _power_of_two(limit: int, most: int) -> int:
    """The greatest that is neither over ``limit`` nor over ``most``; at least one."""
    return 1 << (max(min(limit, most), 1).bit_length() - 1)


def _plus(a: Expr, b: Expr) -> Expr:
    return a + b
