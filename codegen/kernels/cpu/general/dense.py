"""Dense linear of any shape in wide tiles, weight in panels.

The loops are those of `sparsify.codegen.kernels.cpu.dense`. It makes sums alone: whoever turns the
tiles into rows adds the epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.dense import DenseTiles
from sparsify.codegen.kernels.cpu.lane_linear import LaneSums
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    LaneTile,
    Tensor,
    WideTile,
    arguments,
    bind,
    ceil_div,
    prim_func,
    symbol,
    tiled_tasks,
)
from sparsify.layouts import LANES

_K_BLOCK = 384
_CHUNK_ROWS = 192
"""Output features of a task, about."""


@dataclass(frozen=True)
class GeneralDense:
    """The kernel's specification.

    Attributes:
        rows: output features of a panel.
        vectors: widest token tile, in vectors.
    """

    isa: Isa
    rows: int
    vectors: int

    @property
    def name(self) -> str:
        return f"general_dense_{self.isa.name}_r{self.rows}_v{self.vectors}"

    def build(self) -> Any:
        """A PrimFunc ``(x, panels, y)``.

        ``x[groups, in_features, 16]`` and ``y[groups, 1 + rows * panels, 16]`` in wide tiles.
        """
        return _Emitter(self).build()


class _Emitter(LaneSums, DenseTiles):
    def __init__(self, spec: GeneralDense) -> None:
        chunk_panels = _CHUNK_ROWS // spec.rows
        super().__init__(spec.isa, spec.rows, _K_BLOCK, chunk_panels, ragged=False)
        self.spec = spec

    def build(self) -> Any:
        with prim_func(self.spec.name) as result:
            token_groups, in_features, y_features, panel_count = (symbol() for _ in range(4))
            self.x, self.panels, self.y = arguments(
                Tensor("x", (token_groups, in_features, LANES)),
                Tensor("panels", (panel_count, in_features, self.rows)),
                Tensor("y", (token_groups, y_features, LANES)),
            )
            self.set_sizes((y_features, in_features), panel_count)
            chunks = ceil_div(panel_count, self.chunk_panels)
            tiled_tasks(self.isa, token_groups, chunks, self.spec.vectors, self._tile, WideTile)
        return result[0]

    def _tile(self, tile: LaneTile, index: Expr, chunk: Expr) -> None:
        x_base = bind(tile.base(index, self.in_features))
        y_base = bind(tile.base(index, self.out_features) + tile.pitch)
        self.task(tile, chunk, x_base, y_base)
