"""Linear kernels of any layout, built together and called by hand."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsify.contracts import CostModel
from sparsify.layouts import LANES, Layout, WeightStats
from sparsify.ops import to_lanes


@dataclass(frozen=True)
class Weight:
    """A weight ``[out, in]`` and where it comes from, ``random`` or a DLMC model."""

    origin: str
    label: str
    matrix: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def nnz(self) -> int:
        return int(self.matrix.count_nonzero())

    @property
    def sparsity(self) -> int:
        """Percent."""
        return round(100 - 100 * self.nnz / self.matrix.numel())


def random_weight(shape: str, sparsity: int) -> Weight:
    """Exactly that percentage of zeros, spread evenly at random (seeded)."""
    out, features = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(out * features + sparsity)
    matrix = torch.randn(out, features, generator=generator)
    zeros = torch.randperm(matrix.numel(), generator=generator)[: matrix.numel() * sparsity // 100]
    matrix.view(-1)[zeros] = 0
    return Weight("random", f"{sparsity}%", matrix)


@dataclass(frozen=True)
class Calls:
    """One kernel in lanes, and the same between the conversions, which fills ``y``."""

    in_lanes: Callable[[], None]
    row_major: Callable[[], None]
    y: torch.Tensor


def built(kernels: Iterable[Any], target: Any) -> Any:
    """The functions of all kernels, by name, in one library on our thread pool."""
    import tvm

    from sparsify.codegen.build import build_kernels
    from sparsify.codegen.runtime import pool

    with tempfile.TemporaryDirectory(prefix="linears-") as folder:
        path = Path(folder, "kernels.so")
        build_kernels(kernels, target).export_library(str(path))
        functions = tvm.runtime.load_module(str(path))
        pool.redirect(path)
    return functions


def cheapest(cost: CostModel, stats: WeightStats, tokens: int) -> Layout:
    """What the compiler chooses: the fastest by prediction of the layouts that fit."""
    shape, nnz = stats.shape, stats.nnz
    fitting = [c for c in cost.candidates(shape, nnz, tokens) if c.fits(stats) is None]
    return min(fitting, key=lambda layout: cost.linear_seconds(layout, shape, nnz, tokens))


class Kernels:
    """Every kernel in lanes that the cells need."""

    def __init__(self, weights: Sequence[Weight], tokens: Iterable[int], counts: Iterable[int]):
        from sparsify.codegen.cost import CpuCostModel
        from sparsify.codegen.target import Target

        self.target = Target.parse("native")
        self._costs = {count: CpuCostModel(self.target, count) for count in counts}
        cells = [(w, n, count) for w in weights for n in tokens for count in self._costs]
        needed = [
            kernel
            for weight, n, count in cells
            for kernel in self._route(weight.shape, self.layout(weight, n, count))
        ]
        self._functions = built(needed, self.target)

    def layout(self, weight: Weight, tokens: int, count: int) -> Layout:
        return cheapest(self._costs[count], WeightStats(weight.shape, weight.nnz), tokens)

    def _route(self, shape: tuple[int, int], layout: Layout) -> tuple[Any, Any, Any]:
        from sparsify.codegen.kernels.cpu.lanes import FromLanes, ToLanes
        from sparsify.codegen.registry import LinearSite, linear_kernels

        out, features = shape
        isa = self.target.isa
        kernel = linear_kernels(layout, LANES).kernel(isa, LinearSite(out, features), layout)
        return ToLanes(isa, features), kernel, FromLanes(isa, out)

    def calls(self, weight: Weight, x: torch.Tensor, layout: Layout) -> Calls:
        """The weight's kernel bound to activations."""
        from tvm.runtime import from_dlpack

        from sparsify.codegen.runtime.executor import aligned

        tokens, (out, _) = x.shape[0], weight.shape
        names = [kernel.name for kernel in self._route(weight.shape, layout)]
        enter, multiply, leave = (self._functions[name] for name in names)
        y = torch.full((tokens, out), math.nan)
        y_lanes = torch.full((-(-tokens // LANES), out, LANES), math.nan)
        packed = layout.pack(weight.matrix).values()
        x_rows, x_lanes, *stored = (
            from_dlpack(aligned(t)) for t in (x, to_lanes.reference(x), *packed)
        )
        given = (x_lanes, *stored, from_dlpack(y_lanes))
        first, last = (x_rows, x_lanes), (given[-1], from_dlpack(y))

        def in_lanes() -> None:
            multiply(*given)

        def row_major() -> None:
            enter(*first)
            multiply(*given)
            leave(*last)

        return Calls(in_lanes, row_major, y)
