"""Tiles of queries in lanes: gathered before attention, and their results scattered after it.

Sequences of a batch follow each other without padding, so a tile need not begin at a lane group:
then queries are gathered and results scattered lane by lane.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.simd import Expr, bind, choose, i64, load, splat, store
from sparsify.layouts import LANES


class QueryTiles:
    """The queries of a kernel, a tile at a time.

    Attributes:
        heads, kv_heads, head_dim: head ``h`` attends with key head ``h * kv_heads // heads``.
        vectors, tile: a tile, in vectors and in queries.
        features: of the tensor that holds the query, where head 0 begins at ``offset``.
        factor: what queries are multiplied by.
        query, y, groups, queries: the kernel's arguments, to be set before tiles are read; groups
            is the first extent of query and y, queries their tokens of a sequence.
        first: the first query of the current tile in its sequence.
    """

    query: Expr
    y: Expr
    groups: Expr
    queries: Expr
    first: Expr

    def __init__(
        self,
        isa: Isa,
        heads: tuple[Expr | int, Expr | int, Expr | int],
        vectors: int,
        features: Expr | int,
        offset: Expr | int,
        factor: Expr | float,
    ) -> None:
        self.set_sizes(heads, features, offset, factor)
        self.width, self.vectors, self.tile = isa.vector, vectors, vectors * isa.vector

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

    def result(self, value: Expr, vector: int) -> Expr:
        """What is stored for a vector of the tile's queries."""
        return value

    @contextmanager
    def each_tile(self, batch: Expr) -> Iterator[tuple[Expr, Expr]]:
        """A parallel loop over the tiles of all sequences and heads, with both as its values.

        Tiles differ in work, by causality or by their blocks of keys; so threads take turns.
        """
        # At least one: TVM's analyser would try a division by zero tiles.
        tiles = bind(T.max(T.floordiv(self.queries + (self.tile - 1), self.tile), T.int64(1)))
        with take_turns(batch * self.heads * tiles) as task:
            row, tile = bind(T.floordiv(task, tiles)), bind(T.floormod(task, tiles))
            sequence = bind(T.floordiv(row, self.heads))
            head = bind(T.floormod(row, self.heads))
            self.first = bind(tile * self.tile)
            self._token = bind(sequence * self.queries + self.first)
            self._group = bind(T.floordiv(self._token, LANES))
            self._misplaced = bind(self._token - self._group * LANES)
            yield sequence, head

    def cell(self, row: Expr, vector: int) -> Expr:
        """Offset of a vector of the tile in ``[rows, tile]``."""
        return row * self.tile + vector * self.width

    def _group_place(self, vector: int, features: Expr | int) -> Expr:
        """Offset of feature 0 of a vector of a tile that begins at a lane group."""
        group, part = divmod(vector * self.width, LANES)
        # The last tile may reach past the last lane group; its lanes there are unused.
        inside = T.min(self._group + group, self.groups - 1)
        return inside * (features * LANES) + part

    def gather_queries(self, head: Expr, into: Expr) -> None:
        """Fills ``into``, ``[head_dim, tile]``, with a head's scaled queries."""
        feature = bind((self.offset + head * self.head_dim) * LANES)

        def aligned() -> None:
            for v in range(self.vectors):
                at = bind(self._group_place(v, self.features) + feature)
                with T.serial(i64(self.head_dim)) as d:
                    value = load(self.query, at + d * LANES, self.width)
                    scaled = value * splat(self.factor, self.width)
                    store(into, self.cell(d, v), scaled, self.width)

        def gathered() -> None:
            last = bind(self._token - self.first + self.queries - 1)
            with T.serial(T.int64(self.tile)) as lane:
                token = T.min(self._token + lane, last)
                at = bind(place_in_lanes(token, self.features) + feature)
                with T.serial(i64(self.head_dim)) as d:
                    value = self.query[at + d * LANES] * splat(self.factor, 1)
                    store(into, d * self.tile + lane, value, 1)

        choose(True, self._misplaced == 0, aligned, gathered)

    def scatter_results(self, head: Expr, found: Expr, scale: list[Expr]) -> None:
        """Stores ``found``, ``[head_dim, tile]``, times the scale of each vector of queries."""
        features = self.heads * self.head_dim
        feature = bind(head * (self.head_dim * LANES))
        whole = T.And(self._misplaced == 0, self.first + self.tile <= self.queries)

        def aligned() -> None:
            for v in range(self.vectors):
                at = bind(self._group_place(v, features) + feature)
                with T.serial(i64(self.head_dim)) as d:
                    value = load(found, self.cell(d, v), self.width) * scale[v]
                    store(self.y, at + d * LANES, self.result(value, v), self.width)

        def scattered() -> None:
            with T.serial(i64(self.head_dim)) as d:
                for v in range(self.vectors):
                    value = load(found, self.cell(d, v), self.width) * scale[v]
                    store(found, self.cell(d, v), self.result(value, v), self.width)
            with T.serial(T.min(T.int64(self.tile), self.queries - self.first)) as lane:
                at = bind(place_in_lanes(self._token + lane, features) + feature)
                with T.serial(i64(self.head_dim)) as d:
                    store(self.y, at + d * LANES, found[d * self.tile + lane], 1)

        choose(True, whole, aligned, scattered)


@contextmanager
def take_turns(tasks: Expr) -> Iterator[Expr]:
    """A parallel loop of which thread ``t`` of ``n`` runs the tasks ``t``, ``t + n`` ..."""
    with (
        T.attr(T.int32(0), "pragma_parallel_launch_point", T.int32(1)),
        T.attr(T.int32(0), "pragma_parallel_stride_pattern", T.int32(1)),
        T.parallel(tasks) as task,
    ):
        yield task


def place_in_lanes(token: Expr, features: Expr | int) -> Expr:
    """Offset of feature 0 of a token in ``[groups, features, 16]``."""
    return T.floordiv(token, LANES) * (features * LANES) + T.floormod(token, LANES)
