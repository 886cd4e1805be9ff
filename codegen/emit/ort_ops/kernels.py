"""Which kernels are in the library, all of them for any shape, and the C table that names them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.attention_mask import AttentionMask, MaskShape
from sparsify.codegen.kernels.cpu.gated import Gated
from sparsify.codegen.kernels.cpu.general.active import GeneralColumns, GeneralGatedRows
from sparsify.codegen.kernels.cpu.general.attention import GeneralAttention, Mask
from sparsify.codegen.kernels.cpu.general.dense import GeneralDense
from sparsify.codegen.kernels.cpu.general.norm import GeneralNorm
from sparsify.codegen.kernels.cpu.general.rows import (
    FinishRows,
    GeneralDenseRows,
    GeneralSellRows,
)
from sparsify.codegen.kernels.cpu.general.sell import GeneralSell
from sparsify.codegen.kernels.cpu.general.tiles import FromTiles, ToTiles
from sparsify.codegen.kernels.cpu.linear import (
    DenseKernels,
    SellKernels,
    dense_vectors,
    sell_vectors,
)
from sparsify.codegen.kernels.cpu.linear_columns import columns_widest
from sparsify.codegen.kernels.cpu.linear_rows import DenseRowsKernels, SellRowsKernels
from sparsify.codegen.kernels.cpu.rotary import Rotary
from sparsify.codegen.operators.attention import query_vectors
from sparsify.codegen.registry import Kernel
from sparsify.layouts import FEW_TOKENS, LANES, Dense, PackedDense, Sell
from sparsify.ops import ACTIVATIONS

_SELL = {True: Sell(8, 256, 384), False: Sell(4, 192, 384)}
"""By whether there are 32 vector registers; blocks and windows are the widest."""

_DENSE = PackedDense(6)

_SAMPLE = (768, 768)
_TOKENS = 128


@dataclass
class Table:
    """Kernels by name, and the definitions of C that refer to them."""

    kernels: dict[str, Kernel] = field(default_factory=dict)
    definitions: list[str] = field(default_factory=list)

    def symbol(self, kernel: Kernel) -> str:
        self.kernels[kernel.name] = kernel
        return f"__tvm_ffi_{kernel.name}"

    def symbols(self, kernels: Iterator[Kernel]) -> str:
        return "{" + ", ".join(map(self.symbol, kernels)) + "}"

    def define(self, declaration: str, value: str) -> None:
        self.definitions.append(f"{declaration} = {value};")


def kernel_table(isa: Isa) -> Table:
    """The kernels of a target."""
    table = Table()
    sell = _SELL[isa.registers >= 32]
    _tiled(
        table, isa, "sell_kernels", GeneralSell(isa, sell.rows, sell_vectors(isa, sell)), sell.rows
    )
    dense = GeneralDense(isa, _DENSE.rows, dense_vectors(isa))
    _tiled(table, isa, "dense_kernels", dense, _DENSE.rows)
    _few_tokens(table, isa, sell.rows)
    for kind in ("layer", "rms"):
        symbol = table.symbol(GeneralNorm(isa, kind))
        table.define(f"Kernel *const {kind}_norm_kernel", symbol)
    gates = (Gated(isa, None, activation, "rows") for activation in ACTIVATIONS)
    table.define("Kernel *const gated_kernels[ACTIVATIONS]", table.symbols(gates))
    rotary = table.symbol(Rotary(isa, None, None, None, "rows"))
    table.define("Kernel *const rotary_kernel", rotary)
    _attention(table, isa)
    _costs(table, isa, sell)
    return table


def _tiled(
    table: Table, isa: Isa, name: str, kernel: GeneralSell | GeneralDense, rows: int
) -> None:
    vectors = kernel.vectors
    leave = (FromTiles(isa, vectors, activation) for activation in ACTIVATIONS)
    table.define(
        f"const TiledKernels {name}",
        f"{{{table.symbol(ToTiles(isa, vectors))}, {table.symbol(kernel)}, {table.symbols(leave)}, "
        f"{table.symbol(FromTiles(isa, vectors, residual=True))}, {rows}}}",
    )


def _few_tokens(table: Table, isa: Isa, sell_rows: int) -> None:
    finish = (FinishRows(isa, activation) for activation in ACTIVATIONS)
    matrix = GeneralDenseRows(isa)
    table.define("Kernel *const finish_rows_kernels[ACTIVATIONS]", table.symbols(finish))
    table.define("Kernel *const sell_rows_kernel", table.symbol(GeneralSellRows(isa, sell_rows)))
    table.define("Kernel *const dense_rows_kernel", table.symbol(matrix))
    rows = DenseRowsKernels()
    columns = table.symbol(GeneralColumns(isa, columns_widest(isa)))
    gated = table.symbol(GeneralGatedRows(isa, rows.rows, rows.widest))
    table.define("Kernel *const columns_kernel", columns)
    table.define("Kernel *const gated_rows_kernel", gated)
    table.define("const int64_t few_tokens", str(FEW_TOKENS))
    table.define("const int64_t dense_rows_unit", str(matrix.rows))


def _attention(table: Table, isa: Isa) -> None:
    masks: tuple[Mask, ...] = ("none", "keys", "queries")
    vectors = query_vectors(isa)
    kernels = (
        GeneralAttention(isa, mask, vectors, listed) for listed in (False, True) for mask in masks
    )
    table.define("Kernel *const attention_kernels[6]", table.symbols(kernels))
    prepare = (AttentionMask(MaskShape(True, True, True), dtype) for dtype in ("bool", "float32"))
    table.define("Kernel *const mask_kernels[2]", table.symbols(prepare))
    # Wide tiles of 16 tokens are lanes.
    lanes = isa.vectors_per_group
    table.define("Kernel *const to_lanes_kernel", table.symbol(ToTiles(isa, lanes)))
    leave = table.symbol(FromTiles(isa, lanes, spare=0))
    table.define("Kernel *const from_lanes_kernel", leave)


def _costs(table: Table, isa: Isa, sell: Sell) -> None:
    """The cost model's formulas, which are linear in the sizes, as their coefficients."""
    rows, columns = _SAMPLE
    weights = rows * columns
    groups = sell.groups(rows) * sell.blocks(columns)
    sums = groups * sell.rows

    def sell_cycles(nnz: int, tokens: int) -> float:
        return SellKernels().cycles(isa, sell, _SAMPLE, nnz, tokens)

    def row_cycles(nnz: int, tokens: int) -> float:
        return SellRowsKernels().cycles(isa, sell, _SAMPLE, nnz, tokens)

    def matrix_cycles(tokens: int) -> float:
        return DenseRowsKernels().cycles(isa, Dense(), _SAMPLE, 0, tokens) / weights

    def dense_cycles(tokens: int) -> float:
        return DenseKernels().cycles(isa, _DENSE, _SAMPLE, 0, tokens) / weights

    tiled = []
    for tokens in (LANES, _TOKENS):
        empty, filled = sell_cycles(0, tokens), sell_cycles(weights, tokens)
        nonzero = (filled - empty) / weights
        tiled.append(f"{{{nonzero!r}, {empty / sums!r}, {dense_cycles(tokens)!r}}}")
    table.define("const TileCosts few_costs", tiled[0])
    table.define("const TileCosts many_costs", tiled[1])
    none, several = row_cycles(0, 1), row_cycles(0, 2)
    matrix = matrix_cycles(2) - matrix_cycles(1)
    fields = (
        (row_cycles(weights, 1) - none) / weights,
        (row_cycles(weights, 2) - several) / weights,
        none / groups,
        (several - none) / (rows + columns),
        matrix_cycles(1) - matrix,
        matrix,
    )
    table.define("const RowCosts row_costs", f"{{{', '.join(map(repr, fields))}}}")
    table.define("const int64_t sell_widest_block", str(sell.k_block))
    table.define("const int64_t sell_window_rows", str(sell.window))


def declarations(table: Table) -> list[str]:
    return [f"extern Kernel __tvm_ffi_{name};" for name in table.kernels]


__all__ = ["Table", "declarations", "kernel_table"]
