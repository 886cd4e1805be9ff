"""Rows of tokens to wide tiles and back, with the epilogue of a linear on the way back.

Squares of tokens and features are transposed in registers, as in
`sparsify.codegen.kernels.cpu.lanes`. A task is a tile of tokens and a chunk of features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.lanes import transposed
from sparsify.codegen.kernels.cpu.math import ACTIVATIONS, Vector
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    LaneTile,
    Tensor,
    WideTile,
    arguments,
    bind,
    ceil_div,
    load,
    prim_func,
    splat,
    store,
    symbol,
    tiled_tasks,
)
from sparsify.layouts import LANES

_CHUNK = 128
"""Features of a task."""


@dataclass(frozen=True)
class ToTiles:
    """``x[tokens, features]`` to ``y[groups, features, 16]`` in wide tiles; unused lanes are zero.

    Attributes:
        vectors: widest tile.
    """

    isa: Isa
    vectors: int

    @property
    def name(self) -> str:
        return f"to_tiles_{self.isa.name}_v{self.vectors}"

    def build(self) -> Any:
        """A PrimFunc ``(x, y)``."""
        width = self.isa.vector
        with prim_func(self.name) as result:
            tokens, groups, features = symbol(), symbol(), symbol()
            x, y = arguments(
                Tensor("x", (tokens, features)), Tensor("y", (groups, features, LANES))
            )

            def square(first: Expr, at: Expr, pitch: int, feature: Expr, count: int) -> None:
                stack = T.alloc_buffer((width * count,), "float32", scope="global")
                with T.serial(T.int64(width)) as i, T.If(first + i < tokens):
                    with T.Then():
                        value = load(x, (first + i) * features + feature, count)
                        store(stack, i * count, value, count)
                    with T.Else():
                        store(stack, i * count, splat(0.0, count), count)
                if count > 1:
                    _transpose(stack, width)
                with T.serial(T.int64(count)) as i:
                    store(y, at + i * pitch, load(stack, i * width, width), width)

            _each_square(self.isa, self.vectors, groups, features, features, 0, square)
        return result[0]


@dataclass(frozen=True)
class FromTiles:
    """Wide tiles to rows: ``y = activation(x + bias) + residual``, dropping unused lanes.

    Attributes:
        vectors: widest tile.
        residual: whether there is one.
        spare: features of a tile before the first.
    """

    isa: Isa
    vectors: int
    activation: str = "none"
    residual: bool = False
    spare: int = 1

    @property
    def name(self) -> str:
        name = f"from_tiles_{self.isa.name}_v{self.vectors}_s{self.spare}_{self.activation}"
        return f"{name}_residual" if self.residual else name

    def build(self) -> Any:
        """A PrimFunc ``(x, bias[, residual], y)``.

        ``x[groups, x_features, 16]`` has spare features, and may end with more of them;
        ``bias[features]``, residual and ``y[tokens, features]``.
        """
        width = self.isa.vector
        with prim_func(self.name) as result:
            tokens, groups, features, x_features = (symbol() for _ in range(4))
            rows = (tokens, features)
            x, bias, residual, y = arguments(
                Tensor("x", (groups, x_features, LANES)),
                Tensor("bias", (features,)),
                Tensor("residual", rows) if self.residual else None,
                Tensor("y", rows),
            )

            def square(first: Expr, at: Expr, pitch: int, feature: Expr, count: int) -> None:
                stack = T.alloc_buffer((width * count,), "float32", scope="global")
                with T.serial(T.int64(count)) as i:
                    store(stack, i * width, load(x, at + i * pitch, width), width)
                if count > 1:
                    _transpose(stack, width)
                start = bind(load(bias, feature, count))
                with T.serial(T.min(T.int64(width), tokens - first)) as i:
                    place = bind((first + i) * features + feature)
                    total = bind(load(stack, i * count, count) + start)
                    value = Vector(total, count, self.isa)
                    value = ACTIVATIONS[self.activation](value).value
                    if residual is not None:
                        value = value + load(residual, place, count)
                    store(y, place, value, count)

            _each_square(self.isa, self.vectors, groups, x_features, features, self.spare, square)
        return result[0]


def _transpose(square: Expr, width: int) -> None:
    """In place; distances known only at run time stay outside, for LLVM is slow with many."""
    rows = [bind(load(square, i * width, width)) for i in range(width)]
    for i, column in enumerate(transposed(rows, width)):
        store(square, i * width, column, width)


Square = Callable[[Expr, Expr, int, Expr, int], None]
"""``(first token, offset in the tiles, distance of features there, feature, features)``."""


def _each_square(
    isa: Isa,
    vectors: int,
    groups: Expr,
    tile_features: Expr,
    features: Expr,
    spare: int,
    square: Square,
) -> None:
    """Runs ``square`` over squares of a vector's tokens and features, then single features.

    Tiles have ``tile_features``, of which the first ``spare`` and those past ``features`` are left.
    """
    width = isa.vector

    def run(tile: LaneTile, index: Expr, chunk: Expr) -> None:
        begin = bind(chunk * _CHUNK)
        count = bind(T.min(T.int64(_CHUNK), features - begin))
        whole = bind(T.floordiv(count, width))
        base = bind(tile.base(index, tile_features) + spare * tile.pitch)
        with T.serial(T.int64(tile.vectors)) as vector:
            first = bind(index * tile.pitch + vector * width)
            start = bind(base + vector * width)
            with T.serial(whole) as step:
                feature = bind(begin + step * width)
                square(first, bind(start + feature * tile.pitch), tile.pitch, feature, width)
            with T.serial(count - whole * width) as rest:
                feature = bind(begin + whole * width + rest)
                square(first, bind(start + feature * tile.pitch), tile.pitch, feature, 1)

    tiled_tasks(isa, groups, ceil_div(features, _CHUNK), vectors, run, WideTile)
