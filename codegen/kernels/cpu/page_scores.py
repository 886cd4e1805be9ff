"""How a page is scored for the query heads of a key head: the members of `SelectPages`.

Each emits its scores of the full pages of one sequence, ``[group, padded]`` in a buffer. Query
heads share what is loaded of a page, and a page some way ahead is prefetched: pages have no order
in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.paged_cache import PAGE, CacheOperands
from sparsify.codegen.kernels.cpu.paged_heads import each_heads
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    Tensor,
    bind,
    i64,
    load,
    prefetch,
    reduce_lanes,
    require,
    splat,
    store,
)
from sparsify.layouts import LANES
from sparsify.selectors import Scoring

if TYPE_CHECKING:
    from sparsify.codegen.kernels.cpu.select_pages import SelectPages


AHEAD = 4
"""How far before it is scored a page is prefetched."""


class PageScores(ABC):
    """One way of scoring, with its tensor declared."""

    def __init__(
        self,
        spec: SelectPages,
        cache: CacheOperands,
        query: Expr,
        keys: Expr,
        tensor: Expr,
        scores: Expr,
    ) -> None:
        self.spec, self.cache = spec, cache
        self.query, self.keys, self.tensor, self.scores = query, keys, tensor, scores
        self.width, self.dim = spec.isa.vector, spec.head_dim
        self.group = spec.heads // spec.kv_heads

    @staticmethod
    def operand(spec: SelectPages, cache: CacheOperands) -> Tensor | None:
        """The parameter that it reads besides query and keys."""
        return None

    def allocate(self, calls: Expr) -> None:  # noqa: B027  (most need none)
        """Takes scratch for so many calls of `score`, where the function begins."""

    def check(self) -> None:  # noqa: B027  (most have nothing to check)
        """Emits what must hold of the parameter before it is read."""

    def score(
        self,
        number: Expr,
        sequence: Expr,
        token: Expr,
        head: Expr,
        first: Expr,
        end: Expr,
        at: Expr,
        padded: Expr,
    ) -> None:
        """The scores of the pages from ``first`` up to ``end``; page 0's lies at ``at``.

        ``number`` is that of the call.
        """
        spec = self.spec
        source = bind(token * spec.features + spec.offset + head * (self.group * self.dim))
        query, stride = self.prepare(number, source)
        self.sequence, self.head, self.last = sequence, head, bind(end - 1)
        with T.serial(end - first) as step:
            page = bind(first + step)
            self.begin(page)
            each_heads(
                self.group,
                lambda h, heads: self.page(
                    bind(query + h * stride), bind(at + h * padded + page), heads, padded
                ),
            )

    def prepare(self, number: Expr, source: Expr) -> tuple[Expr, int]:
        """Where the query of the group's first head is, and how far the next one is behind it."""
        return source, self.dim

    @abstractmethod
    def begin(self, page: Expr) -> None:
        """Finds a page, and prefetches one ahead."""

    @abstractmethod
    def page(self, query: Expr, target: Expr, heads: int, padded: Expr) -> None:
        """The scores of the page for ``heads`` query heads, the first of them at ``query``."""


class BoundScores(PageScores):
    """The largest product that a key within the bounds of a part of the page could have.

    A feature's product is largest with the largest key where the query is positive, else with the
    least: so the query is split by sign first, and repeated for all parts, which lie in lanes.
    """

    @staticmethod
    def operand(spec: SelectPages, cache: CacheOperands) -> Tensor | None:
        return cache.bounds

    def allocate(self, calls: Expr) -> None:
        self.size = self.dim * self.spec.parts
        size = calls * (2 * self.group * self.size)
        self.signed = T.alloc_buffer((size,), "float32", scope="global")

    def prepare(self, number: Expr, source: Expr) -> tuple[Expr, int]:
        stride, parts = 2 * self.size, self.spec.parts
        target = bind(number * (self.group * stride))
        with T.serial(T.int64(self.group)) as h, T.serial(T.int64(self.dim)) as d:
            q = bind(self.query[source + h * self.dim + d])
            at = bind(target + h * stride + d * parts)
            for behind, sign in ((0, T.max), (self.size, T.min)):
                for part in range(parts):
                    store(self.signed, at + (behind + part), sign(q, T.float32(0)), 1)
        return target, stride

    def begin(self, page: Expr) -> None:
        self.at = bind(self.cache.bounds_at(self.sequence, page, self.head))
        following = T.min(page + AHEAD, self.last)
        after = bind(self.cache.bounds_at(self.sequence, following, self.head))
        for line in range(0, 2 * self.size, LANES):
            prefetch(self.tensor, after + line)

    def page(self, query: Expr, target: Expr, heads: int, padded: Expr) -> None:
        width, parts = self.width, self.spec.parts
        # With the largest keys and with the least.
        total = Registers(2 * heads, width)
        for i in range(len(total)):
            total[i] = splat(0.0, width)
        whole = self.size // width
        with T.serial(T.int64(whole)) as step:
            self._add(total, query, bind(step * width), width)
        rest = Registers(2 * heads, parts)
        for i in range(len(total)):
            rest[i] = reduce_lanes(bind(total[i]), width, lambda a, b: a + b, parts)
        with T.serial(T.int64((self.size - whole * width) // parts)) as d:
            self._add(rest, query, bind(whole * width + d * parts), parts)
        for h in range(heads):
            found = reduce_lanes(bind(rest[2 * h] + rest[2 * h + 1]), parts, T.max)
            store(self.scores, target + h * padded, found, 1)

    def _add(self, total: Registers, query: Expr, d: Expr, width: int) -> None:
        least = bind(load(self.tensor, self.at + d, width))
        largest = bind(load(self.tensor, self.at + (self.size + d), width))
        for h in range(len(total) // 2):
            for i, bound in enumerate((largest, least)):
                q = load(self.signed, query + (2 * h + i) * self.size + d, width)
                total[2 * h + i] = total[2 * h + i] + q * bound


class ProductScores(PageScores):
    """The largest product of a key of the page, over all features or the channels listed."""

    @staticmethod
    def operand(spec: SelectPages, cache: CacheOperands) -> Tensor | None:
        if spec.channels is None:
            return None
        return Tensor("channels", (spec.kv_heads, spec.channels), "int32")

    def check(self) -> None:
        if self.spec.channels is None:
            return
        with T.serial(T.int64(self.spec.kv_heads * self.spec.channels)) as i:
            channel = bind(self.tensor[i])
            require(
                T.And(channel >= 0, channel < self.dim),
                "select_pages: a channel is no feature of a head; channels lie between 0 and "
                "head_dim",
            )

    def begin(self, page: Expr) -> None:
        self.at = bind(self.cache.block(self.sequence, page, self.head))
        following = T.min(page + AHEAD, self.last)
        self.after = bind(self.cache.block(self.sequence, following, self.head))

    def page(self, query: Expr, target: Expr, heads: int, padded: Expr) -> None:
        width, vectors = self.width, PAGE // self.width
        total = Registers(heads * vectors, width)
        for i in range(len(total)):
            total[i] = splat(0.0, width)
        count = self.dim if self.spec.channels is None else self.spec.channels
        with T.serial(T.int64(count)) as number:
            d = number
            if self.spec.channels is not None:
                d = bind(i64(self.tensor[self.head * count + number]))
            prefetch(self.keys, self.after + d * PAGE)
            keys = [
                bind(load(self.keys, self.at + (d * PAGE + vector * width), width))
                for vector in range(vectors)
            ]
            for h in range(heads):
                q = bind(splat(self.query[query + (h * self.dim + d)], width))
                for vector, key in enumerate(keys):
                    total[h * vectors + vector] = total[h * vectors + vector] + key * q
        for h in range(heads):
            largest = total[h * vectors]
            for vector in range(1, vectors):
                largest = T.max(largest, total[h * vectors + vector])
            largest = reduce_lanes(bind(largest), width, T.max)
            store(self.scores, target + h * padded, largest, 1)


class OrderScores(PageScores):
    """The page's place in the sequence."""

    def page(self, query: Expr, target: Expr, heads: int, padded: Expr) -> None:
        for h in range(heads):
            store(self.scores, target + h * padded, T.Cast("float32", self.number), 1)

    def begin(self, page: Expr) -> None:
        self.number = page


SCORINGS: dict[Scoring, type[PageScores]] = {
    "bounds": BoundScores,
    "products": ProductScores,
    "order": OrderScores,
}
