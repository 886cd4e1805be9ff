"""Candidates, costs and calls of the experts' kernels, and their registration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import tirx

from sparsify.codegen.experts import ExpertsCall, register_experts
from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.expert_combine import ExpertCombine
from sparsify.codegen.kernels.cpu.expert_dense import DenseExperts
from sparsify.codegen.kernels.cpu.expert_lanes import ExpertLanes
from sparsify.codegen.kernels.cpu.expert_plan import ExpertPlan
from sparsify.codegen.kernels.cpu.expert_sell import SellExperts
from sparsify.codegen.kernels.cpu.lanes import FromLanes
from sparsify.codegen.kernels.cpu.linear import SellKernels, sell_vectors
from sparsify.layouts import LANES, Layout, PackedDense, Sell, Stack

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


_FROM_MEMORY = 1.25
"""Cycles of the SELL kernel over those with weights in the cache, which experts' are not."""


def _plan(lowering: Lowering, call: ExpertsCall, experts: Any, positions: Any, align: int) -> Any:
    tokens = experts.ty.shape.values[0]
    length = tokens * call.slots + positions + 2 * call.shape.count
    kernel = ExpertPlan(call.shape.count, call.slots, align)
    return lowering.call_kernel(kernel, [experts], (length,), (positions,), "int32")


def _combine(
    lowering: Lowering, call: ExpertsCall, results: Any, plan: Any, weights: Any, tokens: Any
) -> Any:
    shape, pitch = call.shape, call.down.pitch
    kernel = ExpertCombine(lowering.target.isa, shape.count, call.slots, shape.out_features, pitch)
    return lowering.call_kernel(kernel, [results, plan, weights], (tokens, shape.out_features))


@dataclass(frozen=True)
class DenseExpertKernels:
    """Weights without enough zeros: tokens as rows, output features in lanes."""

    layout = PackedDense

    def candidates(self, isa: Isa, rows: int, columns: int) -> tuple[Layout, ...]:
        return (PackedDense(isa.vector),)

    def cycles(self, isa: Isa, stack: Stack, density: float, tokens: float, active: float) -> float:
        vectors = stack.pitch * stack.columns / isa.vector
        return active * vectors * max(tokens * 1.2 / isa.fma_per_cycle, 1.0 + tokens / 4)

    def emit(
        self,
        lowering: Lowering,
        call: ExpertsCall,
        x: Any,
        experts: Any,
        weights: Any,
        up: Sequence[Any],
        down: Sequence[Any],
        bias: Sequence[Any],
    ) -> Any:
        isa, shape = lowering.target.isa, call.shape
        tokens = x.ty.shape.values[0]
        positions = tokens * call.slots
        plan = _plan(lowering, call, experts, positions, 1)
        first = DenseExperts(isa, call.up, shape.gated, call.activation, call.bias, call.slots)
        second = DenseExperts(isa, call.down, False, "none", call.bias, 0)
        hidden = lowering.call_kernel(first, [x, plan, *up, *bias[:1]], (positions, call.up.pitch))
        results = lowering.call_kernel(
            second, [hidden, plan, *down, *bias[1:]], (positions, call.down.pitch)
        )
        return _combine(lowering, call, results, plan, weights, tokens)


@dataclass(frozen=True)
class SellExpertKernels:
    """Sparse weights: tokens in lanes."""

    layout = Sell

    def candidates(self, isa: Isa, rows: int, columns: int) -> tuple[Layout, ...]:
        return tuple(
            layout
            for layout in SellKernels().candidates(isa, (rows, columns), rows * columns)
            if -(-rows // layout.window) * layout.window <= 1.1 * rows
        ) or (Sell(4, min(columns, 128), -(-rows // 4) * 4),)

    def cycles(self, isa: Isa, stack: Stack, density: float, tokens: float, active: float) -> float:
        layout = stack.layout
        assert isinstance(layout, Sell)
        shape = (stack.pitch, stack.columns)
        nnz = round(density * stack.rows * stack.columns)
        cached = SellKernels().cycles(isa, layout, shape, nnz, max(1, round(tokens)))
        return active * cached * _FROM_MEMORY

    def emit(
        self,
        lowering: Lowering,
        call: ExpertsCall,
        x: Any,
        experts: Any,
        weights: Any,
        up: Sequence[Any],
        down: Sequence[Any],
        bias: Sequence[Any],
    ) -> Any:
        isa, shape = lowering.target.isa, call.shape
        tokens = x.ty.shape.values[0]
        pairs = tokens * call.slots
        # Each expert that has a token may leave lanes of its last group empty.
        fullest = tirx.floordiv(pairs + (LANES - 1) * shape.count, LANES)
        groups = tirx.min(pairs, fullest)
        plan = _plan(lowering, call, experts, groups * LANES, LANES)
        lanes = ExpertLanes(isa, shape.count, call.slots, shape.in_features)
        first, second = (
            SellExperts(isa, stack, features, gated, activation, call.bias, _vectors(isa, stack))
            for stack, features, gated, activation in (
                (call.up, shape.in_features, shape.gated, call.activation),
                (call.down, call.up.pitch, False, "none"),
            )
        )
        value = lowering.call_kernel(lanes, [x, plan], (groups, shape.in_features, LANES))
        for kernel, packed, own in ((first, up, bias[:1]), (second, down, bias[1:])):
            value = lowering.call_kernel(
                kernel, [value, plan, *packed, *own], (groups, kernel.stack.pitch, LANES)
            )
        pitch = call.down.pitch
        rows = lowering.call_kernel(FromLanes(isa, pitch), [value], (groups * LANES, pitch))
        return _combine(lowering, call, rows, plan, weights, tokens)


def _vectors(isa: Isa, stack: Stack) -> int:
    assert isinstance(stack.layout, Sell)
    return sell_vectors(isa, stack.layout)


register_experts(DenseExpertKernels())
register_experts(SellExpertKernels())
