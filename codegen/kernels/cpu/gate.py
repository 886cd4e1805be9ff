"""The gate: features that a rule drops become zero. Every rule, in rows and in lanes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.gates import gate_kernels
from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.math import Vector
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Tensor,
    arguments,
    bind,
    load,
    prim_func,
    splat,
    store,
    symbol,
)
from sparsify.codegen.kernels.cpu.sums import sum_in_lanes, sum_of_row
from sparsify.codegen.kernels.cpu.tokens import Features, each_token, tensor
from sparsify.gates import Gate
from sparsify.layouts import LANES, Form


@dataclass(frozen=True)
class GateKernel:
    """The kernel's specification."""

    isa: Isa
    features: int
    gate: Gate
    form: Form

    @property
    def name(self) -> str:
        options = dataclasses.astuple(self.gate)
        rule = "_".join([self.gate.name, *map(str, options)])
        return f"gate_{self.form}_{self.isa.name}_{self.features}_{rule}"

    def build(self) -> Any:
        """A PrimFunc ``(x, *parameters, y)``."""
        kernels = gate_kernels(self.gate)
        assert kernels is not None, self.gate
        shapes = self.gate.shapes(self.features)
        with prim_func(self.name) as result:
            count = symbol()
            x, *parameters, y = arguments(
                tensor("x", self.form, count, self.features),
                *(Tensor(f"parameter_{i}", shape) for i, shape in enumerate(shapes)),
                tensor("y", self.form, count, self.features),
            )

            def run(place: Features) -> None:
                token = Token(place, self.features, x, place.base(self.features), parameters)
                dropped = kernels.dropped(self.gate, token)

                def write(at: Expr, width: int) -> None:
                    value = token.value(at, width).value
                    kept = T.Select(dropped(at, width), splat(0.0, width), value)
                    store(y, token.base + at, kept, width)

                token.each(write)

            each_token(self.isa, self.form, count, self.features, run)
        return result[0]


@dataclass(frozen=True)
class Token:
    """One token as a rule sees it, or in lanes one vector of tokens.

    What a rule computes once for a token, a threshold, is a number in rows and a vector in lanes,
    of ``width`` lanes in either case; `spread` puts it beside features.

    Attributes:
        place: where its features lie.
        x: the tensor, in which feature 0 is at `base`.
        parameters: of the gate.
    """

    place: Features
    features: int
    x: Expr
    base: Expr
    parameters: Sequence[Expr]

    @property
    def _in_rows(self) -> bool:
        return self.place.step == 1

    @property
    def width(self) -> int:
        """Lanes of what is computed once for a token."""
        return 1 if self._in_rows else self.place.isa.vector

    def each(self, body: Callable[[Expr, int], None]) -> None:
        """Runs ``body(offset, width)`` over all features."""
        self.place.along(self.features, body)

    def value(self, at: Expr, width: int) -> Vector:
        """The features at an offset."""
        return Vector(bind(load(self.x, self.base + at, width)), width)

    def of_feature(self, parameter: int, at: Expr, width: int) -> Vector:
        """What a parameter ``[features]`` says of the features at an offset."""
        values = self.parameters[parameter]
        if self._in_rows:
            return Vector(bind(load(values, at, width)), width)
        return Vector(splat(values[T.floordiv(at, LANES)], width), width)

    def total(self, term: Callable[[Expr, int], Expr]) -> Vector:
        """``term(offset, width)`` summed over all features."""
        if self._in_rows:
            return Vector(sum_of_row(self.place.isa, self.features, term), 1)
        width = self.place.isa.vector
        return Vector(
            sum_in_lanes(
                self.place.isa, self.features, lambda feature: term(bind(feature * LANES), width)
            ),
            width,
        )

    def spread(self, value: Expr, width: int) -> Expr:
        """What was computed once, beside ``width`` features."""
        return splat(value, width) if self._in_rows else value
