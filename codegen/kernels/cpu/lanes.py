"""Conversions at the border of a region: rows of tokens to lane groups and back.

A square of tokens and features is transposed in registers by log2(width) rounds of exchanges: in
round s, lanes and vectors whose index differs in bit s swap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Tensor,
    arguments,
    bind,
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
                for part in range(self.isa.vectors_per_group):
                    first = bind(group * LANES + part * width)

                    def row(i: int, feature: Expr, count: int, first: Expr = first) -> Expr:
                        at = T.min(first + i, tokens - 1) * self.features + feature
                        inside = first + i < tokens
                        return T.if_then_else(inside, load(x, at, count), splat(0.0, count))

                    def place(feature: Expr, part: int = part) -> Expr:
                        return (group * self.features + feature) * LANES + part * width

                    with T.serial(T.int64(self.features // width)) as square:
                        feature = bind(square * width)
                        rows = [bind(row(i, feature, width)) for i in range(width)]
                        for i, column in enumerate(transposed(rows, width)):
                            store(y, place(feature + i), column, width)
                    for feature in _rest(self.features, width):
                        for i in range(width):
                            store(y, place(T.int64(feature)) + i, row(i, T.int64(feature), 1), 1)
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
                for part in range(self.isa.vectors_per_group):
                    first = bind(group * LANES + part * width)

                    def put(i: int, feature: Expr, value: Expr, count: int, first: Expr) -> None:
                        with T.If(first + i < tokens), T.Then():
                            store(y, (first + i) * self.features + feature, value, count)

                    def place(feature: Expr, part: int = part) -> Expr:
                        return (group * self.features + feature) * LANES + part * width

                    with T.serial(T.int64(self.features // width)) as square:
                        feature = bind(square * width)
                        columns = [bind(load(x, place(feature + i), width)) for i in range(width)]
                        for i, row in enumerate(transposed(columns, width)):
                            put(i, feature, row, width, first)
                    for feature in _rest(self.features, width):
                        for i in range(width):
                            value = x[place(T.int64(feature)) + i]
                            put(i, T.int64(feature), value, 1, first)
        return result[0]


def _rest(features: int, width: int) -> range:
    return range(features // width * width, features)


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
