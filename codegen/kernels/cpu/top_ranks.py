"""The highest of many numbers, and the order in which ties count: what selections are made with.

Numbers are compared as integers in the order of the floats, so the search for the n-th highest
takes 32 counts, one for each bit, whatever the numbers are.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    bind,
    load,
    reduce_lanes,
    splat,
    store,
)

PADDING = 16
"""Ranks are padded to a multiple of this, so that they are whole vectors."""

HIGHEST, _LOWEST = 2**31 - 1, -(2**31)


class TopRanks:
    """``count`` numbers of a buffer of int32 ``ranks`` from ``at`` on, to be filled by `put`."""

    def __init__(self, ranks: Expr, at: Expr, count: Expr, width: int) -> None:
        self.ranks, self.at, self.count, self.width = ranks, at, count, width
        self.steps = bind(T.floordiv(count + (width - 1), width))

    def put(self, value: Callable[[Expr], Expr]) -> None:
        """Takes the numbers, ``value(offset)`` a vector; those behind the last are lowest."""
        width = self.width
        lowest = splat(float("-inf"), width)
        with T.serial(self.steps) as step:
            first = bind(step * width)
            number = bind(value(first))
            lanes = T.Ramp(first, T.int64(1), width) if width > 1 else first
            end = T.Broadcast(self.count, width) if width > 1 else self.count
            number = bind(T.Select(lanes < end, number, lowest))
            store(self.ranks, self.at + first, _ordered(number, width), width)

    def force(self, first: Expr, count: Expr) -> None:
        """Puts some above all others."""
        with T.serial(count) as step:
            store(self.ranks, self.at + first + step, T.int32(HIGHEST), 1)

    def each(self, places: Expr, body: Callable[[Expr, Expr], None]) -> None:
        """``body(place, number)`` for the ``places`` highest, ascending; of equals the first."""
        least = self.highest(lambda bound: self.how_many(bound) >= T.Cast("float32", places))
        last = T.Cast("int32", least)
        left = T.alloc_buffer((2,), "int64", scope="global")
        store(left, 0, places - T.Cast("int64", self.how_many(last, above=True)), 1)
        store(left, 1, T.int64(0), 1)
        with T.serial(self.count) as number:
            rank = bind(self.ranks[self.at + number])
            equal = T.And(rank == last, left[0] > 0)
            with T.If(T.Or(rank > last, equal)), T.Then():
                body(left[1], number)
                store(left, 1, left[1] + 1, 1)
                store(left, 0, left[0] - T.Select(rank == last, T.int64(1), T.int64(0)), 1)

    def highest(self, enough: Callable[[Expr], Expr]) -> Expr:
        """The highest bound of which ``enough`` holds; it holds of all below as well."""
        least = T.alloc_buffer((1,), "int64", scope="global")
        store(least, 0, T.int64(_LOWEST), 1)
        with T.serial(T.int64(32)) as bit:
            higher = bind(least[0] + (T.int64(1) << (T.int64(31) - bit)))
            with T.If(enough(bind(T.Cast("int32", higher)))), T.Then():
                store(least, 0, higher, 1)
        return bind(least[0])

    def how_many(self, bound: Expr, *, above: bool = False) -> Expr:
        """Ranks that are at least, or above, a bound; a float, exact."""
        return self.total(bound, lambda _: splat(1.0, self.width), above=above)

    def total(self, bound: Expr, weight: Callable[[Expr], Expr], *, above: bool = False) -> Expr:
        """The sum of ``weight(offset)``, a vector, over ranks that are at least a bound."""
        width = self.width
        bound = bind(T.Broadcast(bound, width) if width > 1 else bound)
        total = Registers(1, width)
        total[0] = splat(0.0, width)
        with T.serial(self.steps) as step:
            first = bind(step * width)
            rank = load(self.ranks, self.at + first, width)
            counts = rank > bound if above else rank >= bound
            total[0] = total[0] + T.Select(counts, weight(first), splat(0.0, width))
        return bind(reduce_lanes(bind(total[0]), width, lambda a, b: a + b))


def _ordered(value: Expr, width: int) -> Expr:
    """Integers in the order of the floats: the bits below the sign turned for negative ones."""

    def spread(number: int) -> Expr:
        return T.Broadcast(T.int32(number), width) if width > 1 else T.int32(number)

    bits = bind(T.reinterpret(f"int32x{width}" if width > 1 else "int32", value))
    return bits ^ ((bits >> spread(31)) & spread(HIGHEST))
