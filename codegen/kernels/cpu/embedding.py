"""Rows of a table by index, checked: an index outside the table is an error, never a wild read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Tensor,
    along,
    arguments,
    bind,
    i64,
    load,
    prim_func,
    require,
    share,
    store,
    symbol,
)


@dataclass(frozen=True)
class Embedding:
    """The kernel's specification.

    Attributes:
        rows: of the table; None when they are known at run time only.
        dtype: that of the indices, ``int64`` or ``int32``.
    """

    isa: Isa
    rows: int | None
    features: int
    dtype: str

    @property
    def name(self) -> str:
        rows = "any" if self.rows is None else self.rows
        return f"embedding_{self.isa.name}_{rows}x{self.features}_{self.dtype}"

    def build(self) -> Any:
        """A PrimFunc ``(table[rows, features], ids[n], y[n, features])``.

        It fails, naming the table, when an index is negative or not below ``rows``.
        """
        with prim_func(self.name) as result:
            count = symbol()
            rows = symbol() if self.rows is None else self.rows
            table, ids, y = arguments(
                Tensor("table", (rows, self.features)),
                Tensor("ids", (count,), self.dtype),
                Tensor("y", (count, self.features)),
            )
            with T.serial(count) as token:
                inside = T.And(i64(ids[token]) >= 0, i64(ids[token]) < rows)
                size = "" if self.rows is None else f" of {self.rows} rows"
                require(inside, f"embedding: an index is outside the table{size}")

            def copy(token: Expr) -> None:
                source = bind(i64(ids[token]) * self.features)
                target = bind(token * self.features)

                def run(at: Expr, width: int) -> None:
                    store(y, target + at, load(table, source + at, width), width)

                along(self.features, self.isa.vector, run)

            share(count, count * self.features, copy)
        return result[0]
