"""What a linear kernel does with finished sums.

Bias is what accumulators begin with. A residual alone is added when a sum is stored. An activation
is applied afterwards, in a pass over the rows of the task, which are still in cache: its constants
then stay in registers, and it is not copied for every accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.math import ACTIVATIONS, Vector
from sparsify.codegen.kernels.cpu.simd import Expr, LaneTile, bind, load, splat, store
from sparsify.layouts import LANES


@dataclass(frozen=True)
class Epilogue:
    """``activation(sum + bias) + residual``; the flags say which parts there are."""

    bias: bool = False
    activation: str = "none"
    residual: bool = False

    @property
    def name(self) -> str:
        parts = ["bias"] * self.bias + [self.activation] + ["residual"] * self.residual
        return "_".join(part for part in parts if part != "none")

    def start(self, bias: Expr | None, row: Expr, width: int) -> Expr:
        """What an accumulator of an output row begins with."""
        return splat(bias[row] if bias is not None else 0.0, width)

    def stored(self, total: Expr, residual: Expr | None, offset: Expr, width: int) -> Expr:
        """What is stored at ``offset`` for a finished sum."""
        if residual is None or self.activation != "none":
            return total
        return total + load(residual, offset, width)

    def activate(
        self,
        tile: LaneTile,
        features: int,
        y: Expr,
        residual: Expr | None,
        base: Expr,
        first: Expr,
        rows: Expr,
    ) -> None:
        """The pass over a task's ``rows`` output rows from ``first``, in place; for no activation,
        nothing."""
        if self.activation == "none":
            return
        width = tile.isa.vector
        with T.serial(rows) as row:
            at = bind(base + (first + row) * LANES)
            for v in range(tile.vectors):
                offset = at + tile.step(v, features)
                total = Vector(load(y, offset, width), width, tile.isa)
                value = ACTIVATIONS[self.activation](total).value
                if residual is not None:
                    value = value + load(residual, offset, width)
                store(y, offset, value, width)
