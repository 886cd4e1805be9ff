"""Softmax over the last dimension of row-major activations; inside attention it is fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.math import LOG2E, Vector, exp2
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    Tensor,
    arguments,
    bind,
    intrinsic,
    load,
    prim_func,
    splat,
    store,
    symbol,
)

_SMALLEST = -126.0
"""Exponents below it give 0, as does minus infinity."""


@dataclass(frozen=True)
class Softmax:
    """The kernel's specification: any number of rows of any length."""

    isa: Isa

    @property
    def name(self) -> str:
        return f"softmax_{self.isa.name}"

    def build(self) -> Any:
        """A PrimFunc ``(x[rows, features], y[rows, features])``."""
        with prim_func(self.name) as result:
            rows, features = symbol(), symbol()
            shape = (rows, features)
            x, y = arguments(Tensor("x", shape), Tensor("y", shape))
            with T.parallel(rows) as row:
                _Row(self.isa, x, y, bind(row * features), features).emit()
        return result[0]


class _Row:
    """One row: whole vectors, then the rest element by element."""

    def __init__(self, isa: Isa, x: Expr, y: Expr, base: Expr, features: Expr) -> None:
        self.x, self.y, self.base, self.features = x, y, base, features
        self.width, self.isa = isa.vector, isa
        self.whole = bind(T.floordiv(features, self.width))

    def emit(self) -> None:
        maximum = self._reduced(
            lambda at, width: load(self.x, at, width), T.max, "fmax", float("-inf")
        )
        total = self._reduced(
            lambda at, width: self._weight(at, width, maximum), lambda a, b: a + b, "fadd", 0.0
        )
        inverse = bind(T.float32(1.0) / total)

        def scale(at: Expr, width: int) -> None:
            store(self.y, at, load(self.y, at, width) * splat(inverse, width), width)

        self._each(scale)

    def _weight(self, at: Expr, width: int, maximum: Expr) -> Expr:
        """``exp(x - maximum)``, which is also stored."""
        value = Vector(load(self.x, at, width), width, self.isa)
        power = (value - Vector(splat(maximum, width), width, self.isa)) * LOG2E
        seen = bind(
            T.Select(power.value < splat(_SMALLEST, width), splat(0.0, width), exp2(power).value)
        )
        store(self.y, at, seen, width)
        return seen

    def _reduced(
        self,
        term: Callable[[Expr, int], Expr],
        combine: Callable[[Expr, Expr], Expr],
        intrinsic_name: str,
        start: float,
    ) -> Expr:
        """A row's terms combined, the partial results of the lanes last."""
        lanes, rest = Registers(1, self.width), Registers(1, 1)
        lanes[0], rest[0] = splat(start, self.width), T.float32(start)

        def step(at: Expr, width: int) -> None:
            partial = lanes if width == self.width else rest
            partial[0] = combine(partial[0], term(at, width))

        self._each(step)
        first = [T.float32(0.0)] if intrinsic_name == "fadd" else []
        name = f"llvm.vector.reduce.{intrinsic_name}"
        return bind(combine(intrinsic("float32", name, *first, lanes[0]), rest[0]))

    def _each(self, body: Callable[[Expr, int], None]) -> None:
        with T.serial(self.whole) as step:
            body(bind(self.base + step * self.width), self.width)
        done = bind(self.whole * self.width)
        with T.serial(self.features - done) as step:
            body(bind(self.base + done + step), 1)
