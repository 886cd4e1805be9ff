"""Layer and root-mean-square normalisation in lanes: sums run down the features, lane by lane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.math import Vector
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    LaneTile,
    Registers,
    Tensor,
    arguments,
    bind,
    load,
    prim_func,
    splat,
    store,
    symbol,
    tiled_tasks,
)
from sparsify.layouts import LANES

_PARTIAL_SUMS = 4
"""Independent sums, so that additions do not wait for each other."""


@dataclass(frozen=True)
class Norm:
    """The kernel's specification; ``kind`` is ``layer`` or ``rms``."""

    isa: Isa
    features: int
    kind: str
    epsilon: float
    weight: bool
    bias: bool

    @property
    def name(self) -> str:
        epsilon = f"{self.epsilon:.6g}".replace(".", "d").replace("-", "m")
        parts = ["weight"] * self.weight + ["bias"] * self.bias
        return "_".join([f"{self.kind}_norm_{self.isa.name}_{self.features}_e{epsilon}", *parts])

    def build(self) -> Any:
        """A PrimFunc ``(x[, weight][, bias], y)``."""
        with prim_func(self.name) as result:
            groups = symbol()
            shape = (groups, self.features, LANES)
            x, weight, bias, y = arguments(
                Tensor("x", shape),
                Tensor("weight", (self.features,)) if self.weight else None,
                Tensor("bias", (self.features,)) if self.bias else None,
                Tensor("y", shape),
            )

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

    def _mean(self, x: Expr, base: Expr) -> Expr:
        total = self._sum(lambda feature: load(x, base + feature * LANES, self.isa.vector))
        return bind(total * splat(1.0 / self.features, self.isa.vector))

    def _inverse_deviation(self, x: Expr, base: Expr, mean: Expr | None) -> Expr:
        def square(feature: Expr) -> Expr:
            value = load(x, base + feature * LANES, self.isa.vector)
            value = bind(value if mean is None else value - mean)
            return value * value

        variance = Vector(self._sum(square), self.isa.vector).fma(1.0 / self.features, self.epsilon)
        return variance.call("llvm.sqrt").rdiv(1.0).value

    def _sum(self, term: Any) -> Expr:
        width = self.isa.vector
        partial = Registers(_PARTIAL_SUMS, width)
        for i in range(_PARTIAL_SUMS):
            partial[i] = splat(0.0, width)
        whole = self.features // _PARTIAL_SUMS
        with T.serial(T.int64(whole)) as step:
            for i in range(_PARTIAL_SUMS):
                partial[i] = partial[i] + term(step * _PARTIAL_SUMS + i)
        for i in range(self.features % _PARTIAL_SUMS):
            partial[i] = partial[i] + term(T.int64(whole * _PARTIAL_SUMS + i))
        total = partial[0]
        for i in range(1, _PARTIAL_SUMS):
            total = total + partial[i]
        return bind(total)
