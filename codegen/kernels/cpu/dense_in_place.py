"""Dense linear in lanes from a weight that few tokens read otherwise: one copy for both.

The loops are those of `dense`; only where a weight lies differs. In the canonical matrix the rows
of a group are read side by side, in `DenseColumns` as neighbours of a column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.dense import DenseTiles
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.lane_linear import LaneLinear
from sparsify.codegen.kernels.cpu.operands import linear_operands
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Tensor,
    bind,
    prefetch,
    prim_func,
    symbol,
    tiled_tasks,
)
from sparsify.layouts import Dense, DenseColumns

ROWS = 4
"""Output features that advance together; `DenseColumns` has a multiple of them in a panel."""

_COLUMNS_AHEAD = 16
"""Columns between a prefetch and its use."""


@dataclass(frozen=True)
class InPlaceLinear:
    """The kernel's specification; see `DenseLinear` for the fields."""

    isa: Isa
    out_features: int
    in_features: int
    layout: Dense | DenseColumns
    epilogue: Epilogue
    vectors: int
    chunk_panels: int
    k_block: int

    @property
    def name(self) -> str:
        kind = "matrix"
        if isinstance(self.layout, DenseColumns):
            kind = f"columns_r{self.layout.rows}_b{self.layout.value_bits}"
        return (
            f"dense_{kind}_{self.isa.name}_{self.out_features}x{self.in_features}"
            f"_v{self.vectors}_c{self.chunk_panels}_k{self.k_block}_{self.epilogue.name}"
        ).rstrip("_")

    def build(self) -> Any:
        """A PrimFunc ``(x, weight[, bias][, residual], y)``."""
        return (_Matrix if isinstance(self.layout, Dense) else _Columns)(self).build()


class _Emitter(LaneLinear, DenseTiles):
    side_by_side = False
    spec: InPlaceLinear
    out_features: int
    in_features: int

    def __init__(self, spec: InPlaceLinear) -> None:
        ragged = spec.out_features % ROWS != 0
        super().__init__(spec.isa, ROWS, spec.k_block, spec.chunk_panels, ragged)
        self.set_sizes((spec.out_features, spec.in_features), -(-spec.out_features // ROWS))
        self.spec = spec

    def build(self) -> Any:
        spec = self.spec
        with prim_func(spec.name) as result:
            groups = symbol()
            operands = linear_operands(spec, groups, [self.weight()], "lanes")
            self.x, (self.panels,), self.bias, self.residual, self.y = operands
            chunks = -(-self.panel_count // spec.chunk_panels)
            tiled_tasks(spec.isa, groups, chunks, spec.vectors, self.tile)
        return result[0]

    def weight(self) -> Tensor:
        raise NotImplementedError


class _Matrix(_Emitter):
    def weight(self) -> Tensor:
        return Tensor("weight", (self.spec.out_features, self.spec.in_features))

    @property
    def column(self) -> int:
        return 1

    def row_places(self, panel: Expr, column: Expr) -> list[Expr]:
        rows = [panel * ROWS + r for r in range(ROWS)]
        if self.ragged:
            rows = [T.min(row, T.int64(self.out_features - 1)) for row in rows]
        return [bind(row * self.in_features + column) for row in rows]

    def fetch(self, w_at: list[Expr], k: Expr) -> None:
        """Rows are streams, which processors follow unasked."""


class _Columns(_Emitter):
    def weight(self) -> Tensor:
        layout = self.layout
        dtype = "float32" if layout.value_bits == 32 else "int16"
        panels = layout.panel_count(self.spec.out_features)
        return Tensor("panels", (panels, self.spec.in_features, layout.rows), dtype)

    @property
    def layout(self) -> DenseColumns:
        assert isinstance(self.spec.layout, DenseColumns)
        return self.spec.layout

    @property
    def column(self) -> int:
        return self.layout.rows

    def row_places(self, panel: Expr, column: Expr) -> list[Expr]:
        layout, row = self.layout, panel * ROWS
        whole = T.floordiv(row, layout.rows) * (self.in_features * layout.rows)
        inside = bind(T.floormod(row, layout.rows))
        start = bind(whole + column * layout.rows)
        if layout.value_bits == 32:
            return [start + inside + r for r in range(ROWS)]
        # Of 32 neighbours, the two halves alternate.
        half = T.floordiv(T.floormod(inside, 32), 16)
        first = bind(start + T.floordiv(inside, 32) * 32 + T.floormod(inside, 16) * 2 + half)
        return [first + 2 * r for r in range(ROWS)]

    def fetch(self, w_at: list[Expr], k: Expr) -> None:
        prefetch(self.panels, w_at[0] + (k + _COLUMNS_AHEAD) * self.column)

    def weight_at(self, place: Expr) -> Expr:
        if self.layout.value_bits == 32:
            return self.panels[place]
        upper = T.shift_left(T.Cast("int32", self.panels[place]), T.int32(16))
        return T.reinterpret("float32", upper)
