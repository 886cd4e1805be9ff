"""Conversions at the border of a region: rows of tokens to lane groups and back.

A square of tokens and features is transposed in registers by log2(width) rounds of exchanges: in
round s, lanes and vectors whose index differs in bit s swap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Tensor,
    arguments,
    bind,
    i64,
    load,
    prim_func,
    splat,
    store,
    symbol,
)
from sparsify.layouts import LANES


@dataclass(frozen=True)
class ToLanes:
    """``x[tokens, features]`` to ``y[ceil(tokens / 16), features, 16]``; unused lanes are zero."""

    isa: Isa
    features: int

    @property
    def name(self) -> str:
        return f"to_lanes_{self.isa.name}_{self.features}"

    def build(self) -> Any:
        """A PrimFunc ``(x, y)``."""
        width = self.isa.vector
        with prim_func(self.name) as result:
            tokens, groups = symbol(), symbol()
            x, y = arguments(
                Tensor("x", (tokens, self.features)),
                Tensor("y", (groups, self.features, LANES)),
            )
            with T.parallel(groups) as group:
                base = group * self.features * LANES
                for first, place in vectors(group, LANES, width, base):
                    enter(x, y, width, (first, tokens), self.features, place)
        return result[0]


@dataclass(frozen=True)
class FromLanes:
    """``x[groups, features, 16]`` to ``y[tokens, features]``, dropping unused lanes."""

    isa: Isa
    features: int

    @property
    def name(self) -> str:
        return f"from_lanes_{self.isa.name}_{self.features}"

    def build(self) -> Any:
        """A PrimFunc ``(x, y)``."""
        width = self.isa.vector
        with prim_func(self.name) as result:
            tokens, groups = symbol(), symbol()
            x, y = arguments(
                Tensor("x", (groups, self.features, LANES)),
                Tensor("y", (tokens, self.features)),
            )
            with T.parallel(T.floordiv(tokens + (LANES - 1), LANES)) as group:
                base = group * self.features * LANES
                everything = T.int64(0), T.int64(self.features)
                for first, place in vectors(group, LANES, width, base):
                    leave(x, y, width, (first, tokens), self.features, place, everything)
        return result[0]


Place = Callable[[Expr], Expr]
"""The offset of a feature's vector."""


def vectors(run: Expr, tokens: int, width: int, base: Expr) -> Iterator[tuple[Expr, Place]]:
    """The vectors of ``width`` lanes that hold a run of tokens, features above: the first token of
    each, and its places.

    Args:
        run: its number; all have so many ``tokens``.
        base: the offset of its first feature.
    """
    for part in range(0, tokens, width):

        def place(feature: Expr, part: int = part) -> Expr:
            return base + feature * tokens + part

        yield bind(run * tokens + part), place


def enter(
    x: Expr,
    y: Expr,
    width: int,
    place_of: tuple[Expr, Expr],
    features: Expr | int,
    place: Place,
) -> None:
    """Rows of tokens, to vectors of a feature each; lanes without a token become zero.

    Args:
        width: tokens of a vector.
        place_of: the first of them, and how many tokens ``x[tokens, features]`` has.
        place: the offset in ``y`` of a feature's vector.
    """
    first, tokens = place_of

    def row(i: int, feature: Expr, count: int) -> Expr:
        at = T.min(first + i, tokens - 1) * features + feature
        return T.if_then_else(first + i < tokens, load(x, at, count), splat(0.0, count))

    whole = bind(T.floordiv(i64(features), width))
    with T.serial(whole) as square:
        feature = bind(square * width)
        rows = [bind(row(i, feature, width)) for i in range(width)]
        for i, column in enumerate(transposed(rows, width)):
            store(y, place(feature + i), column, width)
    with T.serial(features - whole * width) as rest:
        feature = bind(rest + whole * width)
        for i in range(width):
            store(y, place(feature) + i, row(i, feature, 1), 1)


def leave(
    x: Expr,
    y: Expr,
    width: int,
    place_of: tuple[Expr, Expr],
    features: Expr | int,
    place: Place,
    run: tuple[Expr, Expr],
) -> None:
    """The way back, for a run of features: where it begins, and how many they are."""
    first, tokens = place_of
    begin, count = run

    def put(i: int, feature: Expr, value: Expr, lanes: int) -> None:
        with T.If(first + i < tokens), T.Then():
            store(y, (first + i) * features + feature, value, lanes)

    whole = bind(T.floordiv(count, width))
    with T.serial(whole) as square:
        feature = bind(begin + square * width)
        columns = [bind(load(x, place(feature + i), width)) for i in range(width)]
        for i, row in enumerate(transposed(columns, width)):
            put(i, feature, row, width)
    with T.serial(count - whole * width) as rest:
        feature = bind(begin + whole * width + rest)
        for i in range(width):
            put(i, feature, x[place(feature) + i], 1)


def transposed(rows: list[Expr], width: int) -> list[Expr]:
    """``width`` vectors of ``width`` lanes, transposed by immediate shuffles."""
    distance = 1
    while distance < width:
        swapped = list(rows)
        for i in range(width):
            if i & distance:
                continue
            pair = [rows[i], rows[i + distance]]
            lanes = range(width)
            low = [lane + width - distance if lane & distance else lane for lane in lanes]
            high = [lane + width if lane & distance else lane + distance for lane in lanes]
            swapped[i] = bind(T.Shuffle(pair, low))
            swapped[i + distance] = bind(T.Shuffle(pair, high))
        rows = swapped
        distance *= 2
    return rows
