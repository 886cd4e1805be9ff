"""Marked blocks as lists, one row of a map after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Tensor,
    arguments,
    bind,
    prim_func,
    share,
    store,
    symbol,
)


@dataclass(frozen=True)
class ListBlocks:
    """The kernel's specification; nothing about it varies."""

    name = "list_blocks"

    def build(self) -> Any:
        """A PrimFunc ``(marks[rows, columns], y[rows, columns])``."""
        with prim_func(self.name) as result:
            rows, columns = symbol(), symbol()
            marks, y = arguments(
                Tensor("marks", (rows, columns), "bool"), Tensor("y", (rows, columns), "int32")
            )

            def row(at: Expr) -> None:
                first = bind(at * columns)
                listed = T.alloc_buffer((1,), "int64", scope="global")
                store(listed, 0, T.int64(0), 1)
                with T.serial(columns) as column:
                    # Every place is written: where nothing is marked the next mark overwrites it.
                    store(y, first + column, T.int32(0), 1)
                    with T.If(marks[first + column]), T.Then():
                        store(y, first + listed[0], T.Cast("int32", column), 1)
                        store(listed, 0, listed[0] + 1, 1)

            share(rows, rows * columns, row)
        return result[0]
