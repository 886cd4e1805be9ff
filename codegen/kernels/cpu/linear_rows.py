"""Candidates, tiles and costs of the linear kernels for few tokens, and their registration.

Cycles were fitted on Sapphire Rapids with weights in the second-level cache, some anew on Zen 4;
weights that come from memory take longer, which the cost model adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.bitmap import BitmapLinear
from sparsify.codegen.kernels.cpu.bitmap_words import spread_cycles
from sparsify.codegen.kernels.cpu.dense_rows import DenseRowsLinear
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.gated_rows import GatedRowsLinear
from sparsify.codegen.kernels.cpu.linear import even_columns, half_rate
from sparsify.codegen.kernels.cpu.panel_rows import PanelRowsLinear
from sparsify.codegen.kernels.cpu.rows import row_share
from sparsify.codegen.kernels.cpu.sell_eights import TOGETHER, narrow
from sparsify.codegen.kernels.cpu.sell_rows import SellRowsLinear
from sparsify.codegen.registry import LinearSite, register_linear
from sparsify.contracts import Side
from sparsify.layouts import LANES, Bitmap, Dense, Form, PackedDense, Sell

_WINDOW = 64
"""Rows of a sorting window for few tokens: those of one parallel task, about."""

_ENTRY_CYCLES = 40.0
"""Cycles to start and end a group of rows in a K block of SELL."""

_MOST_NONZEROS = {16: 0.85, 32: 0.65}
"""Share of nonzeros above which a bitmap of values so wide saves no time."""

_MOVED_CYCLES = 0.3
"""Cycles to bring an activation beside those of other tokens, or a sum back."""

_NEAR = 8192
"""Weights that the first-level cache keeps from one tile of tokens to the next."""

_ROW_CYCLES = 12.0
"""Cycles to finish an active row of one token."""


def list_cycles(isa: Isa, features: int, tokens: int) -> float:
    """Cycles to list the features that are not zero in all tokens."""
    each = 0.6 if isa.name == "avx512" else 2.0
    return features * (each + 0.1 * tokens * isa.vectors_per_group)


def _tile(isa: Isa, sums: int) -> int:
    """Tokens of a tile when each adds ``sums`` accumulators: a power of two, 8 at most."""
    room = max(1, (isa.registers // 2) // sums)
    return int(min(8, 1 << (room.bit_length() - 1)))


def token_widths(tokens: int, widest: int) -> list[int]:
    """The token tiles that `token_tiles` makes."""
    tiles = [widest] * (tokens // widest)
    rest = tokens % widest
    return tiles + [1 << bit for bit in range(rest.bit_length()) if rest >> bit & 1]


def vector_cycles(isa: Isa) -> float:
    """Cycles of multiply-adds over 16 lanes, over those of a core with two 512-bit units."""
    return isa.vectors_per_group * 2.0 / isa.fma_per_cycle


def epilogue_of(site: LinearSite) -> Epilogue:
    return Epilogue(site.bias, site.activation, site.residual)


@dataclass(frozen=True)
class BitmapKernels:
    """Half to nine tenths of zeros."""

    layout = Bitmap
    form: ClassVar[Form] = "rows"

    def candidates(self, isa: Isa, shape: tuple[int, int], nnz: int) -> tuple[Bitmap, ...]:
        if not isa.byte_shuffle:  # nothing spreads a word's values over lanes
            return ()
        density = nnz / (shape[0] * shape[1])
        widths = [bits for bits, most in _MOST_NONZEROS.items() if density <= most]
        return tuple(Bitmap(rows, bits) for bits in widths for rows in (4, 2))

    def kernel(self, isa: Isa, site: LinearSite, layout: Bitmap) -> BitmapLinear:
        shape = site.out_features, site.in_features
        return BitmapLinear(isa, *shape, layout, epilogue_of(site), _tile(isa, layout.rows))

    def cycles(
        self, isa: Isa, layout: Bitmap, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        words = layout.groups(shape[0]) * layout.rows * layout.words(shape[1]) * layout.word / 16
        token = (0.25 + 0.5 / layout.rows) * vector_cycles(isa)
        spread = spread_cycles(isa, layout)
        tiles = token_widths(tokens, _tile(isa, layout.rows))
        return words * sum(spread + token * count for count in tiles)

    def tasks(self, isa: Isa, layout: Bitmap, shape: tuple[int, int], tokens: int) -> int:
        return row_share(shape[0], layout.rows)[0]


@dataclass(frozen=True)
class SellRowsKernels:
    """Six tenths of zeros and more, for one token nine tenths."""

    layout = Sell
    form: ClassVar[Form] = "rows"

    def candidates(self, isa: Isa, shape: tuple[int, int], nnz: int) -> tuple[Sell, ...]:
        blocks = even_columns(shape[1], (1 << 16) // LANES)
        return (Sell(max(8, isa.vector), blocks, _WINDOW),)

    def kernel(self, isa: Isa, site: LinearSite, layout: Sell) -> SellRowsLinear:
        shape = site.out_features, site.in_features
        return SellRowsLinear(isa, *shape, layout, epilogue_of(site))

    def cycles(
        self, isa: Isa, layout: Sell, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        entries = layout.groups(shape[0]) * layout.blocks(shape[1]) * _ENTRY_CYCLES
        if tokens == 1:
            gathered = (1.2 if half_rate(isa) else 0.45) if isa.gathers else 1.5
            return nnz * (0.13 + gathered) + entries
        eight = narrow(isa)
        vector = 1 / min(eight.fma_per_cycle, eight.loads_per_cycle)
        nonzero = 0.2 + (1 + TOGETHER / eight.vector) * vector
        moved = sum(shape) * TOGETHER * _MOVED_CYCLES
        return -(-tokens // TOGETHER) * (nnz * nonzero + entries + moved)

    def tasks(self, isa: Isa, layout: Sell, shape: tuple[int, int], tokens: int) -> int:
        return row_share(shape[0], layout.window)[0]


@dataclass(frozen=True)
class DenseRowsKernels:
    """Weights without enough zeros, as they are; under a gate, the rows that it opens."""

    layout = Dense
    form: ClassVar[Form] = "rows"
    rows: ClassVar[int] = 8
    """Rows at once: so many streams keep memory busy."""
    widest: ClassVar[int] = 4
    """Tokens of a tile: with more, registers hold too few rows."""
    side: ClassVar[Side] = "outputs"

    def candidates(self, isa: Isa, shape: tuple[int, int], nnz: int) -> tuple[Dense, ...]:
        return (Dense(),)

    def kernel(self, isa: Isa, site: LinearSite, layout: Dense) -> DenseRowsLinear:
        shape = site.out_features, site.in_features
        return DenseRowsLinear(isa, *shape, layout, epilogue_of(site), self.rows, self.widest)

    def cycles(
        self, isa: Isa, layout: Dense, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        return shape[0] * self._row_cycles(isa, shape[1], tokens)

    def _row_cycles(self, isa: Isa, features: int, tokens: int) -> float:
        # Zen 4 hides less of several tokens' arithmetic behind rows that come from memory.
        weight, token = (0.6, 0.8) if half_rate(isa) else (0.9, 0.55)
        token *= vector_cycles(isa)
        first, *later = (token * count for count in token_widths(tokens, self.widest))
        again = 0.9 if self.rows * features <= _NEAR else 2.5
        return features / 16 * (weight + first + sum(again + tile for tile in later))

    def tasks(self, isa: Isa, layout: Dense, shape: tuple[int, int], tokens: int) -> int:
        return row_share(shape[0], self.rows)[0]

    def skipping_candidates(self, isa: Isa, shape: tuple[int, int]) -> tuple[Dense, ...]:
        return (Dense(),)

    def skipping_kernel(self, isa: Isa, site: LinearSite, layout: Dense) -> GatedRowsLinear:
        shape = site.out_features, site.in_features
        return GatedRowsLinear(isa, *shape, layout, site.bias, self.rows, self.widest)

    def skipping_cycles(
        self, isa: Isa, layout: Dense, shape: tuple[int, int], tokens: int, share: float
    ) -> float:
        row = self._row_cycles(isa, shape[1], tokens) + _ROW_CYCLES * tokens
        return share * shape[0] * row + list_cycles(isa, shape[0], tokens)


@dataclass(frozen=True)
class PanelRowsKernels:
    """Weights without enough zeros, packed as many tokens need them."""

    layout = PackedDense
    form: ClassVar[Form] = "rows"
    panels: ClassVar[int] = 2

    def candidates(self, isa: Isa, shape: tuple[int, int], nnz: int) -> tuple[PackedDense, ...]:
        return (PackedDense(6),)

    def kernel(self, isa: Isa, site: LinearSite, layout: PackedDense) -> PanelRowsLinear:
        shape = site.out_features, site.in_features
        epilogue = epilogue_of(site)
        return PanelRowsLinear(isa, *shape, layout, epilogue, self.panels, self._widest(isa))

    def cycles(
        self, isa: Isa, layout: PackedDense, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        token = 1.1 * vector_cycles(isa)
        tiles = token_widths(tokens, self._widest(isa))
        return shape[0] * shape[1] / 16 * sum(1.3 + token * count for count in tiles)

    def tasks(self, isa: Isa, layout: PackedDense, shape: tuple[int, int], tokens: int) -> int:
        return row_share(shape[0], layout.rows * self.panels)[0]

    def bandwidth(self, isa: Isa, layout: PackedDense, tokens: int) -> float:
        """One stream a panel keeps memory less busy than rows or columns do."""
        return 0.7

    def _widest(self, isa: Isa) -> int:
        return 4 if isa.registers >= 32 else 2


register_linear(BitmapKernels())
register_linear(SellRowsKernels())
register_linear(DenseRowsKernels())
register_linear(PanelRowsKernels())
