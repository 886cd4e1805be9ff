"""What a linear kernel does with a finished sum before it is stored."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.codegen.kernels.cpu.math import ACTIVATIONS, Vector
from sparsify.codegen.kernels.cpu.simd import Expr, load, splat


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

    def finish(self, total: Expr, residual: Expr | None, offset: Expr, width: int) -> Expr:
        """The value to store at ``offset`` of the output."""
        value = ACTIVATIONS[self.activation](Vector(total, width)).value
        return value if residual is None else value + load(residual, offset, width)
