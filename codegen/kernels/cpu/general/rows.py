"""Linears of any shape for few tokens, ``[tokens, features]``: sums from SELL or from a matrix.

Sums go to ``y[tokens, 1 + ...]``, whose first feature takes those of slots without a row.
`FinishRows` adds the epilogue: for so few tokens a pass of its own costs little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.dense_rows import DenseRowTiles
from sparsify.codegen.kernels.cpu.math import ACTIVATIONS, Vector
from sparsify.codegen.kernels.cpu.rows import token_tiles
from sparsify.codegen.kernels.cpu.sell_rows import SellRowSums
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    Tensor,
    along,
    arguments,
    bind,
    ceil_div,
    load,
    prim_func,
    store,
    symbol,
)

_TASK_UNITS = 8


@dataclass(frozen=True)
class GeneralSellRows:
    """The kernel's specification.

    Attributes:
        rows: the layout's rows of a group.
    """

    isa: Isa
    rows: int

    @property
    def name(self) -> str:
        return f"general_sell_rows_{self.isa.name}_r{self.rows}"

    def build(self) -> Any:
        """A PrimFunc ``(x, starts, outputs, columns, values, k_block, chunk_groups, y)``."""
        with prim_func(self.name) as result:
            tokens, in_features, y_features = symbol(), symbol(), symbol()
            x, *packed, k_block, chunk_groups, y = arguments(
                Tensor("x", (tokens, in_features)),
                Tensor("starts", (symbol(),), "int32"),
                Tensor("outputs", (symbol(),), "int32"),
                Tensor("columns", (symbol(),), "int64"),
                Tensor("values", (symbol(),)),
                Integer("k_block"),
                Integer("chunk_groups"),
                Tensor("y", (tokens, y_features)),
            )
            sums = SellRowSums(self.isa, self.rows, ragged=False, y_first=1)
            out_features = bind(y_features - 1)
            blocks, groups = ceil_div(in_features, k_block), ceil_div(out_features, self.rows)
            shape = out_features, in_features
            sums.set_sizes(shape, k_block, blocks, groups, chunk_groups)
            sums.take(x, packed, y, tokens)
            with T.parallel(ceil_div(groups, chunk_groups)) as chunk:
                row = bind(chunk * chunk_groups * self.rows)
                rows = bind(T.min(chunk_groups * self.rows, out_features - row))
                sums.run(chunk, T.int64(1), row, rows)
        return result[0]


@dataclass(frozen=True)
class GeneralDenseRows:
    """The kernel's specification.

    Attributes:
        rows: output rows that share a load of activations, a power of two.
        tokens: widest token tile, a power of two.
    """

    isa: Isa
    rows: int = 8
    tokens: int = 4

    @property
    def name(self) -> str:
        return f"general_dense_rows_{self.isa.name}_r{self.rows}_t{self.tokens}"

    def build(self) -> Any:
        """A PrimFunc ``(x, weight, y)``.

        Its in_features are padded to a multiple of 16 and its out_features to one of ``rows``, of
        ``y`` after the spare feature.
        """
        return _Dense(self).build()


class _Dense(DenseRowTiles):
    def __init__(self, spec: GeneralDenseRows) -> None:
        self.isa, self.unit, self.spec = spec.isa, spec.rows, spec
        self.y_first, self.out_features = 1, None

    def build(self) -> Any:
        with prim_func(self.spec.name) as result:
            tokens, rows = symbol(), symbol()
            self.in_features, self.y_features = symbol(), symbol()
            self.x, self.matrix, self.y = arguments(
                Tensor("x", (tokens, self.in_features)),
                Tensor("weight", (rows, self.in_features)),
                Tensor("y", (tokens, self.y_features)),
            )
            units = bind(T.floordiv(rows, self.unit))
            with T.parallel(T.floordiv(units + (_TASK_UNITS - 1), _TASK_UNITS)) as task:
                first = bind(task * _TASK_UNITS)
                with T.serial(T.min(T.int64(_TASK_UNITS), units - first)) as i:
                    row = bind((first + i) * self.unit)
                    token_tiles(
                        tokens, self.spec.tokens, lambda token, count: self.tile(row, token, count)
                    )
        return result[0]


@dataclass(frozen=True)
class FinishRows:
    """``y = activation(x + bias)``, dropping the spare features of ``x``."""

    isa: Isa
    activation: str

    @property
    def name(self) -> str:
        return f"finish_rows_{self.isa.name}_{self.activation}"

    def build(self) -> Any:
        """A PrimFunc ``(x[tokens, 1 + ...], bias[features], y[tokens, features])``."""
        with prim_func(self.name) as result:
            tokens, features, x_features = symbol(), symbol(), symbol()
            x, bias, y = arguments(
                Tensor("x", (tokens, x_features)),
                Tensor("bias", (features,)),
                Tensor("y", (tokens, features)),
            )
            with T.serial(tokens) as token:
                source, target = bind(token * x_features + 1), bind(token * features)

                def put(at: Expr, width: int, source: Expr = source, target: Expr = target) -> None:
                    value = load(x, source + at, width) + load(bias, at, width)
                    total = Vector(bind(value), width, self.isa)
                    value = ACTIVATIONS[self.activation](total).value
                    store(y, target + at, value, width)

                along(features, self.isa.vector, put)
        return result[0]
