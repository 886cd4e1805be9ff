"""Rows of a table by index, checked: an index outside the table is an error, never a wild read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.simd import (
    Tensor,
    arguments,
    bind,
    i64,
    load,
    prim_func,
    store,
    symbol,
)


@dataclass(frozen=True)
class Embedding:
    """The kernel's specification; ``dtype`` is that of the indices, ``int64`` or ``int32``."""

    isa: Isa
    rows: int
    features: int
    dtype: str

    @property
    def name(self) -> str:
        return f"embedding_{self.isa.name}_{self.rows}x{self.features}_{self.dtype}"

    def build(self) -> Any:
        """A PrimFunc ``(table[rows, features], ids[n], y[n, features])``.

        It fails, naming the table, when an index is negative or not below ``rows``.
        """
        width = self.isa.vector
        with prim_func(self.name) as result:
            count = symbol()
            table, ids, y = arguments(
                Tensor("table", (self.rows, self.features)),
                Tensor("ids", (count,), self.dtype),
                Tensor("y", (count, self.features)),
            )
            with T.serial(count) as token:
                inside = T.And(i64(ids[token]) >= 0, i64(ids[token]) < self.rows)
                message = f"embedding: an index is outside the table of {self.rows} rows"
                with T.Assert(inside, message, "IndexError"):
                    T.evaluate(0)
            with T.parallel(count) as token:
                source = bind(i64(ids[token]) * self.features)
                target = bind(token * self.features)
                with T.serial(T.int64(self.features // width)) as step:
                    value = load(table, source + step * width, width)
                    store(y, target + step * width, value, width)
                for feature in range(self.features // width * width, self.features):
                    store(y, target + feature, table[source + feature], 1)
        return result[0]
