"""Predicted time of a linear operator on a CPU: cycles by its kernels' own formula, over the clock.

The formulas were fitted on Zen 4 and a server Intel; the clock is nominal, so ratios mean more
than times.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.codegen.experts import all_expert_kernels, expert_kernels
from sparsify.codegen.registry import all_linear_kernels, linear_kernels
from sparsify.codegen.target import Target
from sparsify.layouts import Layout, Stack, form_of

_BYTES_PER_SECOND = 15e9
"""Memory bandwidth that one core may count on when the weight comes from memory."""


@dataclass(frozen=True)
class CpuCostModel:
    """The `CostModel` that passes see."""

    target: Target
    threads: int = 1

    def linear_seconds(
        self, layout: Layout, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        isa = self.target.isa
        kernels = linear_kernels(layout, tokens)
        seconds = kernels.cycles(isa, layout, shape, nnz, tokens) / isa.hertz
        tasks = kernels.tasks(isa, layout, shape, tokens)
        longest = -(-tasks // self.threads) / tasks
        streaming = layout.estimate_nbytes(shape, nnz) / _BYTES_PER_SECOND
        return max(seconds * longest, streaming)

    def candidates(self, shape: tuple[int, int], nnz: int, tokens: int) -> tuple[Layout, ...]:
        return tuple(
            layout
            for kernels in all_linear_kernels()
            if kernels.form == form_of(tokens)
            for layout in kernels.candidates(self.target.isa, shape, nnz)
        )

    @property
    def bytes_per_second(self) -> float:
        return _BYTES_PER_SECOND

    @property
    def flops_per_second(self) -> float:
        isa = self.target.isa
        return 2 * isa.vector * isa.fma_per_cycle * isa.hertz * self.threads

    def expert_layouts(self, shape: tuple[int, int]) -> tuple[Layout, ...]:
        return tuple(
            layout
            for kernels in all_expert_kernels().values()
            for layout in kernels.candidates(self.target.isa, *shape)
        )

    def experts_seconds(self, stack: Stack, density: float, tokens: float, active: float) -> float:
        isa = self.target.isa
        cycles = expert_kernels(stack.layout).cycles(isa, stack, density, tokens, active)
        shape = (stack.pitch, stack.columns)
        nnz = round(density * stack.rows * stack.columns)
        streaming = active * stack.layout.estimate_nbytes(shape, nnz) / _BYTES_PER_SECOND
        return max(cycles / isa.hertz / self.threads, streaming)
