"""Tokens into lanes expert by expert: 16 of one expert side by side.

for group of 16 positions (parallel): the rows of their tokens, transposed; zero where there is none
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.expert_plan import Plan
from sparsify.codegen.kernels.cpu.lanes import transposed
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
class ExpertLanes:
    """The kernel's specification; the plan is one of whole lane groups."""

    isa: Isa
    experts: int
    slots: int
    features: int

    @property
    def name(self) -> str:
        return f"expert_lanes_{self.isa.name}_{self.experts}x{self.slots}_{self.features}"

    def build(self) -> Any:
        """A PrimFunc ``(x[tokens, features], plan, y[groups, features, 16])``."""
        width, features = self.isa.vector, self.features
        with prim_func(self.name) as result:
            tokens, length, groups = symbol(), symbol(), symbol()
            x, buffer, y = arguments(
                Tensor("x", (tokens, features)),
                Tensor("plan", (length,), "int32"),
                Tensor("y", (groups, features, LANES)),
            )
            plan = Plan(self.experts, buffer, groups * LANES)
            with T.parallel(groups) as group:
                for part in range(self.isa.vectors_per_group):
                    first = bind(group * LANES + part * width)
                    pairs = [bind(plan.pair(first + i)) for i in range(width)]
                    rows = [bind(T.floordiv(T.max(p, T.int64(0)), self.slots)) for p in pairs]

                    def row(
                        i: int, at: Expr, count: int, pairs: Any = pairs, rows: Any = rows
                    ) -> Expr:
                        value = load(x, rows[i] * features + at, count)
                        return T.if_then_else(pairs[i] >= 0, value, splat(0.0, count))

                    def place(at: Expr, part: int = part) -> Expr:
                        return (group * features + at) * LANES + part * width

                    with T.serial(T.int64(features // width)) as square:
                        at = bind(square * width)
                        taken = [bind(row(i, at, width)) for i in range(width)]
                        for i, column in enumerate(transposed(taken, width)):
                            store(y, place(at + i), column, width)
                    for feature in range(features // width * width, features):
                        for i in range(width):
                            value = row(i, T.int64(feature), 1)
                            store(y, place(T.int64(feature)) + i, value, 1)
        return result[0]
