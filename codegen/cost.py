"""Predicted time of a linear operator on a CPU: cycles by its kernels' own formula, over the clock.

The formulas were fitted on Zen 4 and a server Intel; the clock is nominal, so ratios mean more
than times.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparsify.codegen.experts import all_expert_kernels, expert_kernels
from sparsify.codegen.operators.arguments import arguments_of
from sparsify.codegen.registry import (
    SkippingKernels,
    StallingKernels,
    all_linear_kernels,
    linear_kernels,
    skipping_kernels,
)
from sparsify.codegen.target import Target
from sparsify.contracts import Activity
from sparsify.layouts import LANES, Layout, Stack, form_of
from sparsify.ops import LINEARS, experts
from sparsify.program import Program

_EXPOSED = 0.25
"""Of arithmetic on few tokens, what does not hide behind memory, or the other way round."""

_CACHED = 2.5
"""How much faster than memory the last cache gives weights."""


@dataclass(frozen=True)
class CpuCostModel:
    """The `CostModel` that passes see.

    Attributes:
        resident: weights stay in a cache from call to call, as those of small models do.
    """

    target: Target
    threads: int = 1
    resident: bool = False

    @classmethod
    def of(cls, target: Target, threads: int, programs: Iterable[Program]) -> CpuCostModel:
        """The model for programs, whose linears may fit a cache even where all are dense."""
        sizes: dict[str, int] = {}
        for program in programs:
            for node in program.graph.nodes:
                if node.target in LINEARS:
                    options = arguments_of(node)
                    name = program.weight_names[options["weight"][0].name]
                    sizes[name] = 4 * options["out_features"] * options["in_features"]
                elif node.target == experts.overload:
                    for weight in node.all_input_nodes:
                        if (stack := program.weight_of(weight)) is not None:
                            sizes[program.weight_names[weight.name]] = stack.nbytes
        return cls(target, threads, sum(sizes.values()) <= target.isa.cache_bytes)

    def linear_seconds(
        self, layout: Layout, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        isa = self.target.isa
        kernels = linear_kernels(layout, tokens)
        cycles = kernels.cycles(isa, layout, shape, nnz, tokens)
        tasks = kernels.tasks(isa, layout, shape, tokens)
        nbytes = layout.estimate_nbytes(shape, nnz)
        if kernels.form == "lanes":
            return max(self._computing(cycles, tasks), nbytes / self.bytes_per_second)
        share = 1.0
        if isinstance(kernels, StallingKernels) and not self.resident:
            share = kernels.bandwidth(isa, layout, tokens)
        return _overlapped(self._computing(cycles, tasks), nbytes / (share * self.bytes_per_second))

    def active_seconds(
        self, layout: Layout, shape: tuple[int, int], tokens: int, activity: Activity
    ) -> float | None:
        kernels, isa = skipping_kernels(layout, activity.side), self.target.isa
        if kernels is None or tokens > LANES:
            return None
        cycles = kernels.skipping_cycles(isa, layout, shape, tokens, activity.share)
        tasks = linear_kernels(layout, 1).tasks(isa, layout, shape, tokens)
        nbytes = layout.estimate_nbytes(shape, shape[0] * shape[1]) * activity.share
        # One thread alone does not read as fast as all.
        uneven = -(-tasks // self.threads) * self.threads / tasks
        return _overlapped(self._computing(cycles, tasks), nbytes * uneven / self.bytes_per_second)

    def active_candidates(
        self, shape: tuple[int, int], tokens: int, activity: Activity
    ) -> tuple[Layout, ...]:
        if tokens > LANES:
            return ()
        return tuple(
            layout
            for kernels in all_linear_kernels()
            if isinstance(kernels, SkippingKernels) and kernels.side == activity.side
            for layout in kernels.skipping_candidates(self.target.isa, shape)
        )

    def _computing(self, cycles: float, tasks: int) -> float:
        longest = -(-tasks // self.threads) / tasks
        return cycles / self.target.isa.hertz * longest

    def candidates(self, shape: tuple[int, int], nnz: int, tokens: int) -> tuple[Layout, ...]:
        return tuple(
            layout
            for kernels in all_linear_kernels()
            if kernels.form == form_of(tokens)
            for layout in kernels.candidates(self.target.isa, shape, nnz)
        )

    @property
    def bytes_per_second(self) -> float:
        return self.target.isa.bytes_per_second * (_CACHED if self.resident else 1.0)

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
        streaming = active * stack.layout.estimate_nbytes(shape, nnz) / self.bytes_per_second
        return max(cycles / isa.hertz / self.threads, streaming)


def _overlapped(computing: float, reading: float) -> float:
    """Seconds of arithmetic on weights that are read once."""
    return max(computing, reading) + _EXPOSED * min(computing, reading)
