"""Tile sizes, candidates and costs of the linear kernels, and their registration."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.dense import DenseLinear
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.sell import SellLinear
from sparsify.codegen.registry import LinearSite, register_linear
from sparsify.layouts import LANES, PackedDense, Sell

_CHUNK_ROWS = 224
"""Output rows of one parallel task, about: enough to reuse a block of activations."""

_SELL_STEP_CYCLES = 0.45
"""Cycles of a nonzero and token tile besides its multiply-adds: column, weight, loop."""

_SELL_GROUP_CYCLES = 190.0
"""Cycles to start and end a group of rows: mispredicted loop exit, accumulators, stores."""


def _vectors(isa: Isa, tokens: int) -> int:
    return -(-tokens // LANES) * isa.vectors_per_group


def _chunk(rows: int, unit: int) -> int:
    """Rows of a task: a multiple of ``unit`` that splits the rows into an even number of tasks."""
    chunks = max(2, 2 * round(rows / (2 * _CHUNK_ROWS)))
    return -(-rows // (chunks * unit)) * unit


@dataclass(frozen=True)
class SellKernels:
    """Unstructured sparse weights."""

    layout = Sell

    def candidates(self, isa: Isa, shape: tuple[int, int], nnz: int) -> tuple[Sell, ...]:
        rows = 8 if isa.registers >= 32 else 4
        return (Sell(rows, self._k_block(shape[1]), _chunk(shape[0], rows)),)

    def kernel(self, isa: Isa, site: LinearSite, layout: Sell) -> SellLinear:
        return SellLinear(
            isa,
            site.out_features,
            site.in_features,
            layout,
            Epilogue(site.bias, site.activation, site.residual),
            vectors=2,
            chunk_groups=layout.window // layout.rows,
        )

    def cycles(
        self, isa: Isa, layout: Sell, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        total = _vectors(isa, tokens)
        vectors = min(2, total)
        tiles = total / vectors
        per_step = vectors / min(isa.fma_per_cycle, isa.loads_per_cycle) + _SELL_STEP_CYCLES
        groups = layout.groups(shape[0]) * layout.blocks(shape[1])
        return tiles * (nnz * per_step + groups * _SELL_GROUP_CYCLES * layout.rows / 8)

    def _k_block(self, in_features: int) -> int:
        """Even K blocks whose activations, two vectors of tokens wide, leave room in 32 KB."""
        blocks = -(-in_features // 192)
        return -(-in_features // blocks)


@dataclass(frozen=True)
class DenseKernels:
    """Weights without enough zeros."""

    layout = PackedDense

    def candidates(self, isa: Isa, shape: tuple[int, int], nnz: int) -> tuple[PackedDense, ...]:
        return (PackedDense(6),)

    def kernel(self, isa: Isa, site: LinearSite, layout: PackedDense) -> DenseLinear:
        return DenseLinear(
            isa,
            site.out_features,
            site.in_features,
            layout,
            Epilogue(site.bias, site.activation, site.residual),
            vectors=4 if isa.registers >= 32 else 2,
            chunk_panels=_chunk(site.out_features, layout.rows) // layout.rows,
            k_block=384,
        )

    def cycles(
        self, isa: Isa, layout: PackedDense, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        return 1.03 * shape[0] * shape[1] * _vectors(isa, tokens) / isa.fma_per_cycle


register_linear(SellKernels())
register_linear(DenseKernels())
