"""Layer and root-mean-square normalisation.

In lanes, sums run down the features, lane by lane; a row is summed along its features, in vectors
whose lanes are added up last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.math import Vector
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    LaneTile,
    Tensor,
    along,
    arguments,
    bind,
    in_name,
    load,
    prim_func,
    share,
    splat,
    store,
    symbol,
    tiled_tasks,
)
from sparsify.codegen.kernels.cpu.sums import sum_in_lanes, sum_of_row
from sparsify.layouts import LANES


@dataclass(frozen=True)
class Norm:
    """The kernel's specification in lanes; ``kind`` is ``layer`` or ``rms``."""

    isa: Isa
    features: int
    kind: str
    epsilon: float
    weight: bool
    bias: bool

    @property
    def name(self) -> str:
        parts = ["weight"] * self.weight + ["bias"] * self.bias
        size = f"{self.isa.name}_{self.features}_e{in_name(self.epsilon)}"
        return "_".join([f"{self.kind}_norm", size, *parts])

    def build(self) -> Any:
        """A PrimFunc ``(x[, weight][, bias], y)``."""
        with prim_func(self.name) as result:
            groups = symbol()
            x, weight, bias, y = self._arguments((groups, self.features, LANES))

            def normalise(tile: LaneTile, index: Expr, _: Expr) -> None:
                base = bind(tile.base(index, self.features))
                mean = self._mean(x, base) if self.kind == "layer" else None
                scale = self._inverse_deviation(x, base, mean)
                with T.serial(T.int64(self.features)) as feature:
                    at = base + feature * LANES
                    value = load(x, at, self.isa.vector)
                    value = (value if mean is None else value - mean) * scale
                    if weight is not None:
                        value = value * splat(weight[feature], self.isa.vector)
                    if bias is not None:
                        value = value + splat(bias[feature], self.isa.vector)
                    store(y, at, value, self.isa.vector)

            tiled_tasks(self.isa, groups, 1, 1, normalise)
        return result[0]

    def _arguments(self, shape: tuple[Expr | int, ...]) -> list[Expr]:
        return arguments(
            Tensor("x", shape),
            Tensor("weight", (self.features,)) if self.weight else None,
            Tensor("bias", (self.features,)) if self.bias else None,
            Tensor("y", shape),
        )

    def _mean(self, x: Expr, base: Expr) -> Expr:
        total = sum_in_lanes(
            self.isa,
            self.features,
            lambda feature: load(x, base + feature * LANES, self.isa.vector),
        )
        return bind(total * splat(1.0 / self.features, self.isa.vector))

    def _inverse_deviation(self, x: Expr, base: Expr, mean: Expr | None) -> Expr:
        def square(feature: Expr) -> Expr:
            value = load(x, base + feature * LANES, self.isa.vector)
            value = bind(value if mean is None else value - mean)
            return value * value

        variance = Vector(sum_in_lanes(self.isa, self.features, square), self.isa.vector).fma(
            1.0 / self.features, self.epsilon
        )
        return variance.call("llvm.sqrt").rdiv(1.0).value


class RowNorm(Norm):
    """The kernel's specification for rows ``[tokens, features]``."""

    @property
    def name(self) -> str:
        return f"rows_{super().name}"

    def build(self) -> Any:
        """A PrimFunc ``(x[, weight][, bias], y)``."""
        with prim_func(self.name) as result:
            tokens = symbol()
            x, weight, bias, y = self._arguments((tokens, self.features))

            def normalise(token: Expr) -> None:
                base = bind(token * self.features)
                mean = self._row_mean(x, base) if self.kind == "layer" else None
                scale = self._row_scale(x, base, mean)

                def run(at: Expr, width: int) -> None:
                    value = load(x, base + at, width)
                    value = value if mean is None else value - splat(mean, width)
                    value = value * splat(scale, width)
                    if weight is not None:
                        value = value * load(weight, at, width)
                    if bias is not None:
                        value = value + load(bias, at, width)
                    store(y, base + at, value, width)

                along(self.features, self.isa.vector, run)

            share(tokens, tokens * self.features, normalise)
        return result[0]

    def _row_mean(self, x: Expr, base: Expr) -> Expr:
        total = sum_of_row(self.isa, self.features, lambda at, width: load(x, base + at, width))
        return bind(total * T.float32(1.0 / self.features))

    def _row_scale(self, x: Expr, base: Expr, mean: Expr | None) -> Expr:
        def square(at: Expr, width: int) -> Expr:
            value = load(x, base + at, width)
            value = bind(value if mean is None else value - splat(mean, width))
            return value * value

        variance = Vector(sum_of_row(self.isa, self.features, square), 1).fma(
            1.0 / self.features, self.epsilon
        )
        return variance.call("llvm.sqrt").rdiv(1.0).value
