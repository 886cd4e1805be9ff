"""Tile sizes, candidates and costs of the linear kernels, and their registration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.dense import DenseLinear
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.sell import SellLinear
from sparsify.codegen.kernels.cpu.sell_gated import GatedSell
from sparsify.codegen.registry import LinearSite, register_linear
from sparsify.layouts import LANES, Form, PackedDense, Sell

_TASK_ROWS = 224
"""Output rows of one parallel task, about: enough to reuse a block of activations."""


def even_chunks(rows: int) -> int:
    """An even number of tasks, so that two threads get the same share."""
    return max(2, 2 * round(rows / (2 * _TASK_ROWS)))


def chunk_of(rows: int, unit: int, chunks: int) -> int:
    """Rows of a task, whole groups of ``unit`` rows."""
    return -(-rows // (chunks * unit)) * unit


def vectors_of(isa: Isa, tokens: int) -> int:
    return -(-tokens // LANES) * isa.vectors_per_group


def lane_tiles(isa: Isa, tokens: int, widest: int) -> Iterator[tuple[int, int]]:
    """(tiles, vectors of each) that `tiled_tasks` covers so many tokens with."""
    left = vectors_of(isa, tokens)
    while left:
        count, left = divmod(left, widest)
        if count:
            yield count, widest
        widest = max(1, widest // 2)


def full_rate(isa: Isa) -> bool:
    return isa.vector == 16 and isa.fma_per_cycle >= 2


def half_rate(isa: Isa) -> bool:
    """AVX-512 on units of 256 bits."""
    return isa.vector == 16 and isa.fma_per_cycle < 2


@dataclass(frozen=True)
class SellTuning:
    """What was measured of the SELL kernel on one kind of CPU.

    Attributes:
        tiles: rows of a group and most columns of a K block that are worth considering.
        task_rows: output rows of a task, about, that are; none for an even number of tasks.
        vector: cycles of one vector's multiply-add.
        nonzero: cycles of a nonzero and token tile besides: column, weight, loop.
        sum: cycles of a sum that is loaded and stored, once a K block, and its share of what it
            takes to begin a group of rows.
        line: cycles to bring 64 bytes of activations into the first-level cache, once a task.
        far_line: the same when they no longer fit the second-level cache beside all else.
    """

    tiles: tuple[tuple[int, int], ...]
    task_rows: tuple[int, ...]
    vector: float
    nonzero: float
    sum: float
    line: float
    far_line: float

    @classmethod
    def of(cls, isa: Isa) -> SellTuning:
        if full_rate(isa):
            return _FULL_RATE
        if isa.vector == 4:
            # A lane group is one tile: four vectors at one address. 384 of its columns are 24 KB of
            # the 32 KB of a first-level cache.
            tiles: tuple[tuple[int, int], ...] = ((4, 384),)
        else:
            tiles = ((8 if isa.registers >= 32 else 4, 192),)
        vector = 1 / min(isa.fma_per_cycle, isa.loads_per_cycle)
        return cls(tiles, (), vector, 0.45, 11.9, 0.0, 0.0)


_FULL_RATE = SellTuning(((4, 128), (8, 256), (24, 384)), (192, 384, 768), 0.69, 0.42, 2.2, 0.2, 6.0)
"""AVX-512 at full rate, fitted on a server Intel (Sapphire Rapids)."""

_SECOND_LEVEL = 2 << 20
"""Bytes of its second-level cache."""


@dataclass(frozen=True)
class SellKernels:
    """Unstructured sparse weights."""

    layout = Sell
    form: ClassVar[Form] = "lanes"

    def candidates(self, isa: Isa, shape: tuple[int, int], nnz: int) -> tuple[Sell, ...]:
        tuning = SellTuning.of(isa)
        chunks = [max(1, round(shape[0] / rows)) for rows in tuning.task_rows]
        found = [
            Sell(rows, even_columns(shape[1], widest), chunk_of(shape[0], rows, count))
            for rows, widest in tuning.tiles
            for count in chunks or [even_chunks(shape[0])]
        ]
        return tuple(dict.fromkeys(found))

    def kernel(self, isa: Isa, site: LinearSite, layout: Sell) -> SellLinear:
        return SellLinear(
            isa,
            site.out_features,
            site.in_features,
            layout,
            Epilogue(site.bias, site.activation, site.residual),
            vectors=sell_vectors(isa, layout),
            chunk_groups=layout.window // layout.rows,
        )

    def gated_kernel(
        self, isa: Isa, site: LinearSite, layout: Sell, activation: str
    ) -> GatedSell | None:
        features = site.out_features // 2
        if features % layout.window:
            return None
        vectors = sell_vectors(isa, layout)
        return GatedSell(isa, features, site.in_features, layout, site.bias, activation, vectors)

    def cycles(
        self, isa: Isa, layout: Sell, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        tuning = SellTuning.of(isa)
        sums = layout.groups(shape[0]) * layout.blocks(shape[1]) * layout.rows
        lines = -(-shape[0] // layout.window) * shape[1] * isa.vector * 4 / 64
        touched = layout.estimate_nbytes(shape, nnz) + 4 * sum(shape) * tokens
        line = tuning.line if touched <= _SECOND_LEVEL else tuning.far_line
        return sum(
            count * nnz * (vectors * tuning.vector + tuning.nonzero)
            + count * vectors * (sums * tuning.sum + lines * line)
            for count, vectors in lane_tiles(isa, tokens, sell_vectors(isa, layout))
        )

    def tasks(self, isa: Isa, layout: Sell, shape: tuple[int, int], tokens: int) -> int:
        tiles = -(-vectors_of(isa, tokens) // sell_vectors(isa, layout))
        return tiles * -(-shape[0] // layout.window)


def sell_vectors(isa: Isa, layout: Sell) -> int:
    """Widest token tile: its sums take half of the registers."""
    return max(1, isa.registers // 2 // layout.rows)


def dense_vectors(isa: Isa) -> int:
    """Widest token tile of the dense kernel."""
    return 4 if isa.registers >= 32 else 2


def even_columns(features: int, widest: int) -> int:
    """Columns of a K block: as even as may be, so that its activations leave room in cache."""
    return -(-features // -(-features // widest))


DENSE_FULL_RATE = (0.31, 0.47)
"""Cycles of a weight and token tile, and of each of its vectors; fitted like `_FULL_RATE`."""


@dataclass(frozen=True)
class DenseKernels:
    """Weights without enough zeros."""

    layout = PackedDense
    form: ClassVar[Form] = "lanes"

    def candidates(self, isa: Isa, shape: tuple[int, int], nnz: int) -> tuple[PackedDense, ...]:
        return (PackedDense(6),)

    def kernel(self, isa: Isa, site: LinearSite, layout: PackedDense) -> DenseLinear:
        return DenseLinear(
            isa,
            site.out_features,
            site.in_features,
            layout,
            Epilogue(site.bias, site.activation, site.residual),
            vectors=dense_vectors(isa),
            chunk_panels=self._chunk(site.out_features, layout) // layout.rows,
            k_block=384,
        )

    def cycles(
        self, isa: Isa, layout: PackedDense, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        step, vector = DENSE_FULL_RATE if full_rate(isa) else (0.0, 1.03 / isa.fma_per_cycle)
        tiles = lane_tiles(isa, tokens, dense_vectors(isa))
        return shape[0] * shape[1] * sum(n * (step + vectors * vector) for n, vectors in tiles)

    def tasks(self, isa: Isa, layout: PackedDense, shape: tuple[int, int], tokens: int) -> int:
        tiles = -(-vectors_of(isa, tokens) // dense_vectors(isa))
        return tiles * -(-shape[0] // self._chunk(shape[0], layout))

    def _chunk(self, rows: int, layout: PackedDense) -> int:
        return chunk_of(rows, layout.rows, even_chunks(rows))


register_linear(SellKernels())
register_linear(DenseKernels())
