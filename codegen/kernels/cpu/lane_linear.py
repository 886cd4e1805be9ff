"""Tasks of linear kernels in lanes, whatever the layout: what sums begin with and become."""

from __future__ import annotations

from abc import ABC, abstractmethod

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.operands import LinearSpec
from sparsify.codegen.kernels.cpu.simd import Expr, LaneTile, bind, splat


class LaneTiles(ABC):
    """Emits all sums of one task.

    Attributes:
        rows: output features that advance together, of a group or a panel.
        x, y: the kernel's arguments, to be set before `task`.
    """

    isa: Isa
    rows: int
    x: Expr
    y: Expr

    @abstractmethod
    def task(self, tile: LaneTile, chunk: Expr, x_base: Expr, y_base: Expr) -> tuple[Expr, Expr]:
        """All sums of a chunk and a tile of tokens; its first group or panel and how many.

        The bases are the offsets of the tile's first vector in ``x`` and ``y``.
        """

    @abstractmethod
    def start(self, row: Expr) -> Expr:
        """What the sums of an output row begin with."""

    @abstractmethod
    def stored(self, total: Expr, offset: Expr) -> Expr:
        """What is stored at an offset of ``y`` for a finished sum."""


class LaneLinear(LaneTiles):
    """A whole linear: sums with the epilogue of the specification."""

    spec: LinearSpec
    bias: Expr | None
    residual: Expr | None

    def tile(self, tile: LaneTile, index: Expr, chunk: Expr) -> None:
        """A task of `tiled_tasks`."""
        spec = self.spec
        x_base = bind(tile.base(index, spec.in_features))
        y_base = bind(tile.base(index, spec.out_features))
        first, groups = self.task(tile, chunk, x_base, y_base)
        row = bind(first * self.rows)
        rows = bind(T.min(groups * self.rows, T.int64(spec.out_features) - row))
        spec.epilogue.activate(tile, spec.out_features, self.y, self.residual, y_base, row, rows)

    def start(self, row: Expr) -> Expr:
        return self.spec.epilogue.start(self.bias, row, self.isa.vector)

    def stored(self, total: Expr, offset: Expr) -> Expr:
        return self.spec.epilogue.stored(total, self.residual, offset, self.isa.vector)


class LaneSums(LaneTiles):
    """Sums alone."""

    def start(self, row: Expr) -> Expr:
        return splat(0.0, self.isa.vector)

    def stored(self, total: Expr, offset: Expr) -> Expr:
        return total
