"""Linears of any shape that skip zeros: columns of active inputs, rows under an open gate.

Features are padded to whole vectors of 16 with zeros, which are never active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.active_set import ActiveSet
from sparsify.codegen.kernels.cpu.column_rows import ColumnTiles, part_outputs
from sparsify.codegen.kernels.cpu.gated_rows import GatedRowTiles
from sparsify.codegen.kernels.cpu.rows import token_tiles
from sparsify.codegen.kernels.cpu.simd import Tensor, arguments, bind, prim_func, symbol

_TASK_OUTPUTS = 1024
"""Outputs of a task: a column's part is a page of memory."""

_TASK_ROWS = 64
"""Rows of a task, about, if all are active."""


@dataclass(frozen=True)
class GeneralColumns:
    """The kernel's specification.

    Attributes:
        tokens: widest token tile, a power of two.
    """

    isa: Isa
    tokens: int

    @property
    def name(self) -> str:
        return f"general_columns_{self.isa.name}_t{self.tokens}"

    def build(self) -> Any:
        """A PrimFunc ``(x[tokens, in], columns[in, out], y[tokens, 1 + ...])``."""
        return _Columns(self).build()


class _Columns(ColumnTiles):
    def __init__(self, spec: GeneralColumns) -> None:
        self.isa, self.spec, self.y_first = spec.isa, spec, 1

    def build(self) -> Any:
        with prim_func(self.spec.name) as result:
            tokens = symbol()
            self.in_features, self.rows, self.y_features = symbol(), symbol(), symbol()
            self.x, self.panels, self.y = arguments(
                Tensor("x", (tokens, self.in_features)),
                Tensor("columns", (self.in_features, self.rows)),
                Tensor("y", (tokens, self.y_features)),
            )
            self.list_active(tokens, known=False)
            tasks = bind(T.floordiv(self.rows + (_TASK_OUTPUTS - 1), _TASK_OUTPUTS))
            with T.parallel(tasks) as task:
                begin = bind(task * _TASK_OUTPUTS)
                end = bind(T.min(begin + _TASK_OUTPUTS, self.rows))
                token_tiles(
                    tokens,
                    self.spec.tokens,
                    lambda token, count: self._tile(begin, end, token, count),
                )
        return result[0]

    def _tile(self, begin: Any, end: Any, token: Any, count: int) -> None:
        most = part_outputs(_TASK_OUTPUTS, count)
        with T.serial(T.int64(-(-_TASK_OUTPUTS // most))) as i:
            first = bind(begin + i * most)
            outputs = bind(T.max(T.int64(0), T.min(T.int64(most), end - first)))
            place = (first, bind(self.y_features - 1 - first))
            self.part(first, bind(first + outputs), outputs, most, place, token, count)


@dataclass(frozen=True)
class GeneralGatedRows:
    """The kernel's specification; see `GatedRowsLinear`."""

    isa: Isa
    rows: int
    tokens: int

    @property
    def name(self) -> str:
        return f"general_gated_rows_{self.isa.name}_r{self.rows}_t{self.tokens}"

    def build(self) -> Any:
        """A PrimFunc ``(x[.., in], gate[.., out], weight[.., in], bias[..], y[.., out])``."""
        return _Gated(self).build()


class _Gated(GatedRowTiles):
    def __init__(self, spec: GeneralGatedRows) -> None:
        self.spec, self.isa, self.unit, self.widest = spec, spec.isa, spec.rows, spec.tokens

    def build(self) -> Any:
        with prim_func(self.spec.name) as result:
            self.tokens = symbol()
            self.in_features, self.y_features = symbol(), symbol()
            self.x, self.gate, self.matrix, self.bias, self.y = arguments(
                Tensor("x", (self.tokens, self.in_features)),
                Tensor("gate", (self.tokens, self.y_features)),
                Tensor("weight", (symbol(), self.in_features)),
                Tensor("bias", (symbol(),)),
                Tensor("y", (self.tokens, self.y_features)),
            )
            self.active = ActiveSet(
                self.isa, self.gate, self.tokens, self.y_features, known=False, spare=1
            )
            tasks = T.floordiv(self.y_features + (_TASK_ROWS - 1), _TASK_ROWS)
            self.runs(bind(tasks))
        return result[0]
