"""Candidates and costs of dense weights that lie column by column, and what lanes read in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.column_rows import TOGETHER, ColumnsLinear
from sparsify.codegen.kernels.cpu.column_tiles import ColumnTilesLinear
from sparsify.codegen.kernels.cpu.dense_in_place import ROWS, InPlaceLinear
from sparsify.codegen.kernels.cpu.linear import (
    DENSE_FULL_RATE,
    chunk_of,
    dense_vectors,
    even_chunks,
    full_rate,
    lane_tiles,
    vectors_of,
)
from sparsify.codegen.kernels.cpu.linear_rows import (
    epilogue_of,
    list_cycles,
    token_widths,
    vector_cycles,
)
from sparsify.codegen.kernels.cpu.rows import row_share
from sparsify.codegen.registry import LinearSite, register_linear
from sparsify.contracts import Side
from sparsify.layouts import Dense, DenseColumns, Form

_NARROW = 3
"""Vectors of a panel whose sums for eight tokens are a register file of 32."""

_EIGHT = 8
"""Tokens of a tile of narrow panels."""

_NARROW_CYCLES = 3.0
"""Cycles of a vector of a narrow panel at least, from the second-level cache."""

_PANEL = 1024
"""Outputs of the narrowest panel, about: a column's part is then a page of memory, which processors
do not leave when they fetch ahead. Wider ones are a tenth faster, and fewer."""


def columns_widest(isa: Isa) -> int:
    """Tokens of a tile: more columns than registers are read again from the first-level cache."""
    return 8 if isa.vector == 16 else 4


@dataclass(frozen=True)
class ColumnsKernels:
    """Dense weights, best where inputs are zero for the most part or tokens are several."""

    layout = DenseColumns
    form: ClassVar[Form] = "rows"
    side: ClassVar[Side] = "inputs"

    def candidates(self, isa: Isa, shape: tuple[int, int], nnz: int) -> tuple[DenseColumns, ...]:
        narrow = (DenseColumns(_NARROW * isa.vector),) if isa.name == "avx512" else ()
        return (*narrow, *self.skipping_candidates(isa, shape))

    def kernel(
        self, isa: Isa, site: LinearSite, layout: DenseColumns
    ) -> ColumnsLinear | ColumnTilesLinear:
        if not _is_narrow(isa, layout):
            return self.skipping_kernel(isa, site, layout)
        shape = site.out_features, site.in_features
        return ColumnTilesLinear(isa, *shape, layout, epilogue_of(site), _EIGHT)

    def cycles(
        self, isa: Isa, layout: DenseColumns, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        if not _is_narrow(isa, layout):
            return self.skipping_cycles(isa, layout, shape, tokens, 1.0)
        vectors = layout.panel_count(shape[0]) * layout.rows * shape[1] / 16
        tiles = [_EIGHT] * (tokens // _EIGHT) + [tokens % _EIGHT] * (tokens % _EIGHT > 0)
        token = 0.51 * vector_cycles(isa)
        return vectors * sum(max(_NARROW_CYCLES, token * count) for count in tiles)

    def tasks(self, isa: Isa, layout: DenseColumns, shape: tuple[int, int], tokens: int) -> int:
        if _is_narrow(isa, layout):
            return row_share(shape[0], layout.rows)[0]
        return layout.panel_count(shape[0])

    def bandwidth(self, isa: Isa, layout: DenseColumns, tokens: int) -> float:
        """A narrow panel's few tokens use weights up faster than they are asked for; a wide one is
        read again for each tile of tokens."""
        if _is_narrow(isa, layout):
            return 0.8 if tokens <= _EIGHT // 2 else 1.0
        return 1.0 / len(token_widths(tokens, columns_widest(isa)))

    def skipping_candidates(self, isa: Isa, shape: tuple[int, int]) -> tuple[DenseColumns, ...]:
        """One panel, one for each of two threads, or as many as have columns of a page."""
        narrow = max(1, round(shape[0] / _PANEL))
        counts = sorted({1, 2, narrow, narrow + narrow % 2})
        widths = (_even_width(shape[0], count) for count in counts)
        return tuple(
            DenseColumns(rows, bits) for rows in dict.fromkeys(widths) for bits in (16, 32)
        )

    def skipping_kernel(self, isa: Isa, site: LinearSite, layout: DenseColumns) -> ColumnsLinear:
        shape = site.out_features, site.in_features
        return ColumnsLinear(isa, *shape, layout, epilogue_of(site), columns_widest(isa))

    def skipping_cycles(
        self, isa: Isa, layout: DenseColumns, shape: tuple[int, int], tokens: int, share: float
    ) -> float:
        token = {
            count: (0.62 if count * TOGETHER <= isa.registers else 0.78) * vector_cycles(isa)
            for count in (1, 2, 4, 8)
        }
        weight = 1.0 if layout.value_bits == 32 else 1.3
        tiles = token_widths(tokens, columns_widest(isa))
        outputs = layout.panel_count(shape[0]) * layout.rows
        vectors = share * outputs * shape[1] / 16
        pieces = share * shape[1] * layout.panel_count(shape[0]) * len(tiles)
        sums = vectors * sum(weight + token[count] * count for count in tiles)
        return sums + pieces * _PIECE_CYCLES + list_cycles(isa, shape[1], tokens)


def _is_narrow(isa: Isa, layout: DenseColumns) -> bool:
    """Whether the sums of a panel stay in registers."""
    return layout.rows == _NARROW * isa.vector and layout.value_bits == 32


_PIECE_CYCLES = 8.0
"""Cycles to begin a column's part of a panel."""


def _even_width(outputs: int, panels: int) -> int:
    return -(-outputs // (32 * panels)) * 32


@dataclass(frozen=True)
class InPlaceKernels:
    """Many tokens, from the one copy of a weight that few tokens read otherwise."""

    layout: Any
    slower: float
    """Than panels of a few rows, about."""

    form: ClassVar[Form] = "lanes"

    def candidates(
        self, isa: Isa, shape: tuple[int, int], nnz: int
    ) -> tuple[Dense | DenseColumns, ...]:
        return ()  # panels are faster where nothing else needs the weight so

    def kernel(self, isa: Isa, site: LinearSite, layout: Dense | DenseColumns) -> InPlaceLinear:
        return InPlaceLinear(
            isa,
            site.out_features,
            site.in_features,
            layout,
            epilogue_of(site),
            vectors=dense_vectors(isa),
            chunk_panels=self._chunk(site.out_features) // ROWS,
            k_block=384,
        )

    def cycles(
        self,
        isa: Isa,
        layout: Dense | DenseColumns,
        shape: tuple[int, int],
        nnz: int,
        tokens: int,
    ) -> float:
        step, vector = DENSE_FULL_RATE if full_rate(isa) else (0.0, 1.03 / isa.fma_per_cycle)
        tiles = lane_tiles(isa, tokens, dense_vectors(isa))
        panels = shape[0] * shape[1] * sum(n * (step + vectors * vector) for n, vectors in tiles)
        return self.slower * panels

    def tasks(
        self, isa: Isa, layout: Dense | DenseColumns, shape: tuple[int, int], tokens: int
    ) -> int:
        tiles = -(-vectors_of(isa, tokens) // dense_vectors(isa))
        return tiles * -(-shape[0] // self._chunk(shape[0]))

    def _chunk(self, rows: int) -> int:
        return chunk_of(rows, ROWS, even_chunks(rows))


register_linear(ColumnsKernels())
register_linear(InPlaceKernels(Dense, 1.01))
register_linear(InPlaceKernels(DenseColumns, 1.08))
