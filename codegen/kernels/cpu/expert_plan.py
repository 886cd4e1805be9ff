"""The order in which experts take tokens: a counting sort of all (token, slot) pairs by expert.

A plan is int32 and has four parts:

    starts [experts]        position of each expert's first pair, a multiple of ``align``
    ends   [experts]        position past its last pair
    pairs  [positions]      the pair at each position, token * slots + slot; -1 where there is none
    places [tokens * slots] the position of each pair; -1 where a slot is not used

Positions are in the order of the experts, and in an expert in the order of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    Tensor,
    arguments,
    bind,
    i64,
    prim_func,
    require,
    store,
    symbol,
)


@dataclass(frozen=True)
class Plan:
    """A plan as kernels read it, of so many positions."""

    experts: int
    buffer: Expr
    positions: Expr

    def start(self, expert: Expr) -> Expr:
        return i64(self.buffer[expert])

    def end(self, expert: Expr) -> Expr:
        return i64(self.buffer[expert + self.experts])

    def pair(self, position: Expr) -> Expr:
        return i64(self.buffer[position + 2 * self.experts])

    def place(self, pair: Expr) -> Expr:
        return i64(self.buffer[pair + self.positions + 2 * self.experts])


@dataclass(frozen=True)
class ExpertPlan:
    """The kernel's specification.

    Attributes:
        align: positions at which an expert may begin are multiples of it.
    """

    experts: int
    slots: int
    align: int = 1

    @property
    def name(self) -> str:
        return f"expert_plan_{self.experts}x{self.slots}_a{self.align}"

    def build(self) -> Any:
        """A PrimFunc ``(experts[tokens, slots], int64 positions, plan)``.

        It fails when an expert is none of them and not -1.
        """
        count = self.experts
        with prim_func(self.name) as result:
            tokens, length = symbol(), symbol()
            experts, positions, plan = arguments(
                Tensor("experts", (tokens, self.slots), "int32"),
                Integer("positions"),
                Tensor("plan", (length,), "int32"),
            )
            parts = Plan(count, plan, positions)
            pairs = bind(tokens * self.slots)
            with T.serial(T.int64(2 * count)) as expert:
                store(plan, expert, T.int32(0), 1)
            with T.serial(pairs) as pair:
                expert = bind(i64(experts[pair]))
                known = T.And(expert >= -1, expert < count)
                require(known, f"experts: a token is sent to an expert that is none of {count}")
                with T.If(expert >= 0), T.Then():
                    store(plan, expert + count, plan[expert + count] + 1, 1)
            begin = T.alloc_buffer((1,), "int32", scope="global")
            store(begin, 0, T.int32(0), 1)
            with T.serial(T.int64(count)) as expert:
                found = bind(plan[expert + count])
                store(plan, expert, begin[0], 1)
                store(plan, expert + count, begin[0], 1)
                whole = T.floordiv(found + (self.align - 1), self.align) * self.align
                store(begin, 0, begin[0] + whole, 1)
            if self.align > 1:
                with T.serial(positions) as position:
                    store(plan, position + 2 * count, T.int32(-1), 1)
            with T.serial(pairs) as pair:
                expert = bind(i64(experts[pair]))
                place = bind(pair + positions + 2 * count)
                with T.If(expert >= 0):
                    with T.Then():
                        position = bind(parts.end(expert))
                        store(plan, position + 2 * count, T.Cast("int32", pair), 1)
                        store(plan, place, T.Cast("int32", position), 1)
                        store(plan, expert + count, plan[expert + count] + 1, 1)
                    with T.Else():
                        store(plan, place, T.int32(-1), 1)
        return result[0]
