"""Flash attention with queries in lanes: keys and values are broadcast where they lie.

    for batch, head, tile of queries (parallel):
      for block of keys:
        scores[key, queries] = K[key, :] . Q[:, queries]            # log2 domain
        running maximum; weights = exp2(scores - maximum)           # lane by lane
        out[:, queries] = out * exp2(old - new maximum) + V[key, :] weights[key, queries]
      out / sum of weights

No transposition is needed: in lanes, feature d of 16 neighbouring tokens is one vector, so Q is
ready, and a key's or value's feature is one scalar a fixed step away from the next.

Where multiply-adds take a lane as a factor (NEON), four neighbouring scalars come by one load: a
feature of four keys, which are side by side if the first key's token is a multiple of four, or four
features of a value that lie so.

Kernels derive from `FlashTiles`, which leaves open where keys and values lie and which blocks of
keys a tile reads; only in blocks that say so are scores looked at one by one for what is hidden.

Source: Dao et al., "FlashAttention", 2022; Milakov and Gimelshein, "Online normalizer calculation
for softmax", 2018; for ``skip`` Zhang et al., "SpargeAttention", 2025.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.band import Visit
from sparsify.codegen.kernels.cpu.block_lists import KEYS_AT_ONCE
from sparsify.codegen.kernels.cpu.math import LOG2E, Vector, exp2_below
from sparsify.codegen.kernels.cpu.query_tiles import QueryTiles
from sparsify.codegen.kernels.cpu.scores import Scores
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    bind,
    choose,
    either,
    i64,
    lane_factors,
    load,
    reduce_lanes,
    splat,
    store,
)
from sparsify.layouts import LANES

_QUAD = 4
"""Scalars that one load brings where multiply-adds take lanes; whole steps of a loop as well."""
_LOWEST = -3e38
"""Below every score, masked or not, but for minus infinity."""


class FlashTiles(QueryTiles, ABC):
    """Emits the loop over tiles of queries.

    Attributes:
        scores: how they are made of products.
        value_step: from one feature of a value to the next.
        skip: blocks whose scores all lie lower than this below the maximum so far are left out;
            0: none.
        key, value: the kernel's arguments, to be set before `emit`.
    """

    key: Expr
    value: Expr

    def __init__(
        self,
        isa: Isa,
        heads: tuple[Expr | int, Expr | int, Expr | int],
        vectors: int,
        features: Expr | int,
        offset: Expr | int,
        scores: Scores,
        value_step: int,
        skip: float = 0.0,
    ) -> None:
        super().__init__(isa, heads, vectors, features, offset, scores.factor)
        self.isa = isa
        self.scores = scores
        self.value_step, self.skip = value_step, skip
        # Keys, or features of the output, whose sums are held in half of the registers together.
        self.together = max(1, isa.registers // 2 // vectors)

    @abstractmethod
    def each_block(self, sequence: Expr, head: Expr, kv_head: Expr, visit: Visit) -> None:
        """Emits the loop over the blocks of keys of the tile at ``self.first``.

        ``visit(begin, count, ruled)`` takes at most `KEYS_AT_ONCE` keys, and whether `seen` must be
        asked. The methods below are called from within it.
        """

    @abstractmethod
    def key_place(self, key: Expr) -> Expr:
        """Offset of feature 0 of a key; the next feature lies 16 floats on."""

    @abstractmethod
    def value_place(self, key: Expr) -> Expr:
        """Offset of feature 0 of a key's value."""

    @abstractmethod
    def seen(self, score: Expr, key: Expr, vector: int) -> Expr:
        """Scores of a key with a vector of the tile's queries, minus infinity where unseen."""

    def emit(self, batch: Expr) -> None:
        with self.each_tile(batch) as (sequence, head):
            kv_head = bind(T.floordiv(head * self.kv_heads, self.heads))
            width = self.width
            self._q = T.alloc_buffer((self.head_dim * self.tile,), "float32", scope="local")
            self._out = T.alloc_buffer((self.head_dim * self.tile,), "float32", scope="local")
            self._weights = T.alloc_buffer((KEYS_AT_ONCE * self.tile,), "float32", scope="local")
            self._places = T.alloc_buffer((KEYS_AT_ONCE,), "int64", scope="global")
            self._maximum = Registers(self.vectors, width)
            self._sum = Registers(self.vectors, width)
            self.gather_queries(head, self._q)
            with T.serial(i64(self.head_dim)) as d:
                for v in range(self.vectors):
                    store(self._out, self.cell(d, v), splat(0.0, width), width)
            for v in range(self.vectors):
                self._maximum[v] = splat(_LOWEST, width)
                self._sum[v] = splat(0.0, width)
            self.each_block(sequence, head, kv_head, self._key_block)
            scale = [self._inverse(self._sum[v]) for v in range(self.vectors)]
            self.scatter_results(head, self._out, scale)

    def _inverse(self, total: Expr) -> Expr:
        """1 / total, and 0 for a query that sees no key, as PyTorch has it."""
        seen = total > splat(1e-30, self.width)
        inverse = splat(1.0, self.width) / total
        return bind(T.Select(seen, inverse, splat(0.0, self.width)))

    def _key_block(self, begin: Expr, count: Expr, ruled: Expr | bool) -> None:
        new = Registers(self.vectors, self.width)
        for v in range(self.vectors):
            new[v] = splat(_LOWEST, self.width)
        ruled = ruled if isinstance(ruled, bool) else bind(ruled)
        if self.isa.lane_factors:
            aligned = T.floormod(self.key_place(begin), _QUAD) == 0
            self._quads = bind(T.Select(aligned, T.floordiv(count, _QUAD), T.int64(0)))
        with T.serial(T.floordiv(count + (self.together - 1), self.together)) as group:
            self._scores(begin, count, bind(group * self.together), new, ruled)
        if not self.skip:
            self._weigh(begin, count, new)
            return
        counts = splat(0.0, self.width)
        for v in range(self.vectors):
            # Unused lanes may hold NaN, as may queries: neither lets a block be left out.
            little = new[v] - self._maximum[v] < splat(-self.skip * LOG2E, self.width)
            counts = T.Select(little, counts, splat(1.0, self.width))
        with T.If(reduce_lanes(bind(counts), self.width, T.max) > T.float32(0.0)), T.Then():
            self._weigh(begin, count, new)

    def _scores(
        self, begin: Expr, count: Expr, offset: Expr, new: Registers, ruled: Expr | bool
    ) -> None:
        vectors, width, together = self.vectors, self.width, self.together
        total = Registers(together * vectors, width)
        quads = self.isa.lane_factors and together % _QUAD == 0
        choose(
            quads,
            offset + together <= self._quads * _QUAD if quads else True,
            lambda: (self._add_quads if quads else self._add_keys)(total, begin, count, offset),
            lambda: self._add_keys(total, begin, count, offset),
        )

        def one_by_one(cap: bool, hide: bool) -> None:
            for r in range(together):
                for v in range(vectors):
                    store(self._weights, self.cell(offset + r, v), total[r * vectors + v], width)
            with T.serial(T.int64(together)) as r:
                key = bind(begin + T.min(offset + r, count - 1))
                for v in range(vectors):
                    place = self.cell(offset + r, v)
                    score = bind(load(self._weights, place, width))
                    score = bind(self.scores.value(score, width, self.isa)) if cap else score
                    score = bind(self.seen(score, key, v)) if hide else score
                    new[v] = self._larger(new[v], score)
                    store(self._weights, place, score, width)

        def plain() -> None:
            for v in range(vectors):
                for r in range(together):
                    score = total[r * vectors + v]
                    store(self._weights, self.cell(offset + r, v), score, width)
                    new[v] = self._larger(new[v], score)

        def capped_or_not(hide: bool) -> None:
            either(
                self.scores.capped,
                lambda: one_by_one(True, hide),
                lambda: one_by_one(False, hide) if hide else plain(),
            )

        either(ruled, lambda: capped_or_not(True), lambda: capped_or_not(False))

    def _larger(self, a: Expr, b: Expr) -> Expr:
        if self.isa.nan_extremes:
            return Vector(a, self.width, self.isa).max(Vector(b, self.width)).value
        return T.max(a, b)

    def _add_keys(self, total: Registers, begin: Expr, count: Expr, offset: Expr) -> None:
        """Products of the queries with keys wherever they lie."""
        # Keys past the end repeat the last one: the maximum stands, and their rows are not read.
        keys = [bind(begin + T.min(offset + r, count - 1)) for r in range(self.together)]
        at = [bind(self.key_place(key)) for key in keys]
        total.clear()
        with T.serial(i64(self.head_dim)) as d:
            factors = (bind(splat(self.key[place + d * LANES], self.width)) for place in at)
            self._multiply(total, self._q, d, factors)

    def _add_quads(self, total: Registers, begin: Expr, count: Expr, offset: Expr) -> None:
        """The same with keys that lie side by side, all of them before the end."""
        at = bind(self.key_place(begin + offset))
        total.clear()
        whole = isinstance(self.head_dim, int) and self.head_dim % _QUAD == 0
        steps = _QUAD if whole else 1
        with T.serial(T.floordiv(i64(self.head_dim), steps)) as step:
            for i in range(steps):
                d = bind(step * steps + i)
                places = [at + (d * LANES + r) for r in range(self.together)]
                self._multiply(total, self._q, d, lane_factors(self.key, places))

    def _multiply(self, total: Registers, buffer: Expr, row: Expr, factors: Iterable[Expr]) -> None:
        """Adds the products of a row of a tile with each factor."""
        vectors, width = self.vectors, self.width
        lanes = [bind(load(buffer, self.cell(row, v), width)) for v in range(vectors)]
        for r, factor in enumerate(factors):
            for v in range(vectors):
                total[r * vectors + v] = total[r * vectors + v] + factor * lanes[v]

    def _weigh(self, begin: Expr, count: Expr, new: Registers) -> None:
        """Weights of scores, and what they add to the output."""
        vectors, width = self.vectors, self.width
        rescale = []
        for v in range(vectors):
            new[v] = self._larger(new[v], self._maximum[v])
            shift = (Vector(self._maximum[v], width) - Vector(new[v], width)).value
            rescale.append(exp2_below(Vector(shift, width, self.isa)).value)
            self._maximum[v] = new[v]
            self._sum[v] = self._sum[v] * rescale[v]
        with T.serial(count) as key:
            store(self._places, key, self.value_place(begin + key), 1)
            for v in range(vectors):
                score = Vector(load(self._weights, self.cell(key, v), width), width, self.isa)
                weight = exp2_below(score - Vector(self._maximum[v], width)).value
                store(self._weights, self.cell(key, v), weight, width)
                self._sum[v] = self._sum[v] + weight
        self._each_feature_group(lambda at, size: self._accumulate(at, size, count, rescale))

    def _each_feature_group(self, body: Callable[[Expr, int], None]) -> None:
        if not isinstance(self.head_dim, int):
            groups = bind(T.floordiv(self.head_dim, self.together))
            with T.serial(groups) as group:
                body(bind(group * self.together), self.together)
            with T.serial(self.head_dim - groups * self.together) as feature:
                body(bind(groups * self.together + feature), 1)
            return
        whole, rest = divmod(self.head_dim, self.together)
        if whole:
            with T.serial(T.int64(whole)) as group:
                body(bind(group * self.together), self.together)
        if rest:
            body(T.int64(whole * self.together), rest)

    def _accumulate(self, first: Expr, size: int, count: Expr, rescale: list[Expr]) -> None:
        vectors, width = self.vectors, self.width
        total = Registers(size * vectors, width)
        for r in range(size):
            for v in range(vectors):
                old = load(self._out, self.cell(first + r, v), width)
                total[r * vectors + v] = old * rescale[v]

        def places(key: Expr) -> list[Expr]:
            place = bind(self._places[key] + first * self.value_step)
            return [place + r * self.value_step for r in range(size)]

        done: Expr | int = 0
        if self.isa.lane_factors and self.value_step == LANES:
            done = bind(self._quads * _QUAD)
            with T.serial(self._quads) as quad:
                key = bind(quad * _QUAD)
                four = [
                    lane_factors(self.value, [place + k for k in range(_QUAD)])
                    for place in places(key)
                ]
                for k in range(_QUAD):
                    self._multiply(total, self._weights, key + k, [value[k] for value in four])
        with T.serial(count - done) as rest:
            at = places(done + rest)
            if self.isa.lane_factors and self.value_step == 1:
                factors: Iterable[Expr] = lane_factors(self.value, at)
            else:
                factors = (bind(splat(self.value[place], width)) for place in at)
            self._multiply(total, self._weights, done + rest, factors)
        for r in range(size):
            for v in range(vectors):
                store(self._out, self.cell(first + r, v), total[r * vectors + v], width)
