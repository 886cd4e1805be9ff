"""Flash attention with queries in lanes: keys and values are broadcast where they lie.

    for batch, head, tile of queries (parallel):
      for block of keys:
        scores[key, queries] = K[key, :] . Q[:, queries]            # log2 domain
        running maximum; weights = exp2(scores - maximum)           # lane by lane
        out[:, queries] = out * exp2(old - new maximum) + V[key, :] weights[key, queries]
      out / sum of weights

No transposition is needed: in lanes, feature d of 16 neighbouring tokens is one vector, so Q is
ready, and a key's or value's feature is one scalar a fixed step away from the next. Sequences of a
batch follow each other without padding, so a tile need not begin at a lane group: then queries are
gathered and results scattered lane by lane.

Where multiply-adds take a lane as a factor (NEON), four neighbouring scalars come by one load: a
feature of four keys, which are side by side if the first key's token is a multiple of four, or four
features of a value that lie so.

Kernels derive from `FlashTiles`, which leaves open where keys and values lie and which are seen.

Source: Dao et al., "FlashAttention", 2022; Milakov and Gimelshein, "Online normalizer calculation
for softmax", 2018.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.math import Vector, exp2
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    bind,
    choose,
    i64,
    lane_factors,
    load,
    splat,
    store,
)
from sparsify.layouts import LANES

_KEY_BLOCK = 64
_QUAD = 4
"""Scalars that one load brings where multiply-adds take lanes; whole steps of a loop as well."""
_LOWEST = -3e38
"""Below every score, masked or not, but for minus infinity."""


class FlashTiles(ABC):
    """Emits the loop over tiles of queries.

    Attributes:
        heads, kv_heads, head_dim: head ``h`` attends with key head ``h * kv_heads // heads``.
        vectors: query tile, in vectors.
        features: of the tensor that holds the query, where head 0 begins at ``offset``.
        factor: what queries are multiplied by.
        value_step: from one feature of a value to the next.
        query, key, value, y, groups, queries: the kernel's arguments, to be set before `emit`;
            groups is the first extent of query and y, queries their tokens of a sequence.
    """

    query: Expr
    key: Expr
    value: Expr
    y: Expr
    groups: Expr
    queries: Expr

    def __init__(
        self,
        isa: Isa,
        heads: tuple[Expr | int, Expr | int, Expr | int],
        vectors: int,
        features: Expr | int,
        offset: Expr | int,
        factor: Expr | float,
        value_step: int,
    ) -> None:
        self.set_sizes(heads, features, offset, factor)
        self.width, self.vectors, self.tile = isa.vector, vectors, vectors * isa.vector
        self.isa, self.value_step = isa, value_step
        # Keys, or features of the output, whose sums are held in half of the registers together.
        self.together = max(1, isa.registers // 2 // vectors)

    def set_sizes(
        self,
        heads: tuple[Expr | int, Expr | int, Expr | int],
        features: Expr | int,
        offset: Expr | int,
        factor: Expr | float,
    ) -> None:
        """Sizes of which any may be known only at run time."""
        self.heads, self.kv_heads, self.head_dim = heads
        self.features, self.offset, self.factor = features, offset, factor

    @abstractmethod
    def keys_of_tile(self, sequence: Expr, head: Expr, kv_head: Expr) -> tuple[Expr, Expr]:
        """The first key that a query of the tile at ``self.first`` may see, and the end.

        Called once a tile, before the methods below.
        """

    @abstractmethod
    def key_place(self, key: Expr) -> Expr:
        """Offset of feature 0 of a key; the next feature lies 16 floats on."""

    @abstractmethod
    def value_place(self, key: Expr) -> Expr:
        """Offset of feature 0 of a key's value."""

    @abstractmethod
    def score(self, product: Expr, key: Expr, vector: int) -> Expr:
        """The scores of a key with a vector of the tile's queries, minus infinity where unseen."""

    def result(self, value: Expr, vector: int) -> Expr:
        """What is stored for a vector of the tile's queries."""
        return value

    def emit(self, batch: Expr) -> None:
        # At least one: TVM's analyser would try a division by zero tiles.
        tiles = bind(T.max(T.floordiv(self.queries + (self.tile - 1), self.tile), T.int64(1)))
        with T.parallel(batch * self.heads * tiles) as task:
            row, tile = bind(T.floordiv(task, tiles)), bind(T.floormod(task, tiles))
            sequence = bind(T.floordiv(row, self.heads))
            head = bind(T.floormod(row, self.heads))
            self._tile(sequence, head, bind(tile * self.tile))

    def _tile(self, sequence: Expr, head: Expr, first: Expr) -> None:
        vectors, width = self.vectors, self.width
        self.first = first
        self._token = bind(sequence * self.queries + first)
        self._group = bind(T.floordiv(self._token, LANES))
        self._misplaced = bind(self._token - self._group * LANES)
        kv_head = bind(T.floordiv(head * self.kv_heads, self.heads))
        begin, end = self.keys_of_tile(sequence, head, kv_head)
        self._q = T.alloc_buffer((self.head_dim * self.tile,), "float32", scope="local")
        self._out = T.alloc_buffer((self.head_dim * self.tile,), "float32", scope="local")
        self._weights = T.alloc_buffer((_KEY_BLOCK * self.tile,), "float32", scope="local")
        self._places = T.alloc_buffer((_KEY_BLOCK,), "int64", scope="global")
        self._maximum, self._sum = Registers(vectors, width), Registers(vectors, width)
        self._gather_queries(head)
        with T.serial(i64(self.head_dim)) as d:
            for v in range(vectors):
                store(self._out, self._cell(d, v), splat(0.0, width), width)
        for v in range(vectors):
            self._maximum[v] = splat(_LOWEST, width)
            self._sum[v] = splat(0.0, width)
        count = bind(T.max(end - begin, T.int64(0)))
        if self.isa.lane_factors:
            aligned = T.floormod(self.key_place(begin), _QUAD) == 0
            self._whole_quads = bind(T.Select(aligned, T.int64(-_QUAD), T.int64(0)))
        with T.serial(T.floordiv(count + (_KEY_BLOCK - 1), _KEY_BLOCK)) as block:
            at = bind(begin + block * _KEY_BLOCK)
            self._key_block(at, bind(T.min(T.int64(_KEY_BLOCK), end - at)))
        self._scatter_results(head)

    def _cell(self, row: Expr, vector: int) -> Expr:
        return row * self.tile + vector * self.width

    def _group_place(self, vector: int, features: Expr | int) -> Expr:
        """Offset of feature 0 of a vector of a tile that begins at a lane group."""
        group, part = divmod(vector * self.width, LANES)
        # The last tile may reach past the last lane group; its lanes there are unused.
        inside = T.min(self._group + group, self.groups - 1)
        return inside * (features * LANES) + part

    def _gather_queries(self, head: Expr) -> None:
        feature = bind((self.offset + head * self.head_dim) * LANES)

        def aligned() -> None:
            for v in range(self.vectors):
                at = bind(self._group_place(v, self.features) + feature)
                with T.serial(i64(self.head_dim)) as d:
                    value = load(self.query, at + d * LANES, self.width)
                    store(
                        self._q,
                        self._cell(d, v),
                        value * splat(self.factor, self.width),
                        self.width,
                    )

        def gathered() -> None:
            last = bind(self._token - self.first + self.queries - 1)
            with T.serial(T.int64(self.tile)) as lane:
                token = T.min(self._token + lane, last)
                at = bind(place_in_lanes(token, self.features) + feature)
                with T.serial(i64(self.head_dim)) as d:
                    value = self.query[at + d * LANES] * splat(self.factor, 1)
                    store(self._q, d * self.tile + lane, value, 1)

        choose(True, self._misplaced == 0, aligned, gathered)

    def _scatter_results(self, head: Expr) -> None:
        features = self.heads * self.head_dim
        feature = bind(head * (self.head_dim * LANES))
        scale = [self._inverse(self._sum[v]) for v in range(self.vectors)]
        whole = T.And(self._misplaced == 0, self.first + self.tile <= self.queries)

        def aligned() -> None:
            for v in range(self.vectors):
                at = bind(self._group_place(v, features) + feature)
                with T.serial(i64(self.head_dim)) as d:
                    value = load(self._out, self._cell(d, v), self.width) * scale[v]
                    store(self.y, at + d * LANES, self.result(value, v), self.width)

        def scattered() -> None:
            with T.serial(i64(self.head_dim)) as d:
                for v in range(self.vectors):
                    value = load(self._out, self._cell(d, v), self.width) * scale[v]
                    store(self._out, self._cell(d, v), self.result(value, v), self.width)
            with T.serial(T.min(T.int64(self.tile), self.queries - self.first)) as lane:
                at = bind(place_in_lanes(self._token + lane, features) + feature)
                with T.serial(i64(self.head_dim)) as d:
                    store(self.y, at + d * LANES, self._out[d * self.tile + lane], 1)

        choose(True, whole, aligned, scattered)

    def _inverse(self, total: Expr) -> Expr:
        """1 / total, and 0 for a query that sees no key, as PyTorch has it."""
        seen = total > splat(1e-30, self.width)
        inverse = splat(1.0, self.width) / total
        return bind(T.Select(seen, inverse, splat(0.0, self.width)))

    def _key_block(self, begin: Expr, count: Expr) -> None:
        vectors, width = self.vectors, self.width
        new = Registers(vectors, width)
        for v in range(vectors):
            new[v] = self._maximum[v]
        with T.serial(T.floordiv(count + (self.together - 1), self.together)) as group:
            self._scores(begin, count, bind(group * self.together), new)
        rescale = []
        for v in range(vectors):
            shift = self._vector(self._maximum[v]) - self._vector(new[v])
            rescale.append(exp2(shift).value)
            self._maximum[v] = new[v]
            self._sum[v] = self._sum[v] * rescale[v]
        with T.serial(count) as key:
            store(self._places, key, self.value_place(begin + key), 1)
            for v in range(vectors):
                score = self._vector(load(self._weights, self._cell(key, v), width))
                weight = exp2(score - self._vector(self._maximum[v])).value
                store(self._weights, self._cell(key, v), weight, width)
                self._sum[v] = self._sum[v] + weight
        self._each_feature_group(lambda at, size: self._accumulate(at, size, count, rescale))

    def _vector(self, value: Expr) -> Vector:
        return Vector(value, self.width, self.isa)

    def _scores(self, begin: Expr, count: Expr, offset: Expr, new: Registers) -> None:
        vectors, width = self.vectors, self.width
        total = Registers(self.together * vectors, width)

        def add(d: Expr, factors: Iterable[Expr]) -> None:
            q = [bind(load(self._q, self._cell(d, v), width)) for v in range(vectors)]
            for r, k in enumerate(factors):
                for v in range(vectors):
                    total[r * vectors + v] = total[r * vectors + v] + k * q[v]

        def singly() -> None:
            # Keys past the end repeat the last: the maximum stands, and their rows are not read.
            keys = [bind(begin + T.min(offset + r, count - 1)) for r in range(self.together)]
            at = [bind(self.key_place(key)) for key in keys]
            total.clear()
            with T.serial(i64(self.head_dim)) as d:
                add(d, (bind(splat(self.key[place + d * LANES], width)) for place in at))

        def by_quads() -> None:
            at = bind(self.key_place(begin + offset))
            total.clear()

            def step(d: Expr) -> None:
                first = at + d * LANES
                add(d, lane_factors(self.key, [first + r for r in range(self.together)]))

            _unrolled(self.head_dim, step)

        if self.isa.lane_factors and self.together % _QUAD == 0:
            whole = offset + self.together <= T.bitwise_and(count, self._whole_quads)
            choose(True, whole, by_quads, singly)
        else:
            singly()
        for r in range(self.together):
            for v in range(vectors):
                store(self._weights, self._cell(offset + r, v), total[r * vectors + v], width)
        with T.serial(T.int64(self.together)) as r:
            key = bind(begin + T.min(offset + r, count - 1))
            for v in range(vectors):
                at = self._cell(offset + r, v)
                score = bind(self.score(load(self._weights, at, width), key, v))
                if self.isa.nan_extremes:
                    new[v] = self._vector(new[v]).max(self._vector(score)).value
                else:
                    new[v] = T.max(new[v], score)
                store(self._weights, at, score, width)

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
                old = load(self._out, self._cell(first + r, v), width)
                total[r * vectors + v] = old * rescale[v]

        def add(key: Expr, factors: Iterable[Expr]) -> None:
            weight = [bind(load(self._weights, self._cell(key, v), width)) for v in range(vectors)]
            for r, value in enumerate(factors):
                for v in range(vectors):
                    total[r * vectors + v] = total[r * vectors + v] + value * weight[v]

        def places(key: Expr) -> list[Expr]:
            place = bind(self._places[key] + first * self.value_step)
            return [place + r * self.value_step for r in range(size)]

        def one(key: Expr) -> None:
            at = places(key)
            if self.isa.lane_factors and self.value_step == 1:
                add(key, lane_factors(self.value, at))
            else:
                add(key, (bind(splat(self.value[place], width)) for place in at))

        def four(first_key: Expr) -> None:
            """Whose values of a feature are side by side."""
            at = places(first_key)
            values = [lane_factors(self.value, [p + k for k in range(_QUAD)]) for p in at]
            for k in range(_QUAD):
                add(first_key + k, [value[k] for value in values])

        done: Expr | int = 0
        if self.isa.lane_factors and self.value_step == LANES:
            done = bind(T.bitwise_and(count, self._whole_quads))
            with T.serial(T.floordiv(done, _QUAD)) as quad:
                four(bind(quad * _QUAD))
        with T.serial(count - done) as rest:
            one(done + rest)
        for r in range(size):
            for v in range(vectors):
                store(self._out, self._cell(first + r, v), total[r * vectors + v], width)


def place_in_lanes(token: Expr, features: Expr | int) -> Expr:
    """Offset of feature 0 of a token in ``[groups, features, 16]``."""
    return T.floordiv(token, LANES) * (features * LANES) + T.floormod(token, LANES)


def _unrolled(count: Expr | int, body: Callable[[Expr], None]) -> None:
    """A loop in steps of four, where its count is known to be a multiple."""
    steps = _QUAD if isinstance(count, int) and count % _QUAD == 0 else 1
    with T.serial(T.floordiv(i64(count), steps)) as step:
        for i in range(steps):
            body(bind(step * steps + i))
