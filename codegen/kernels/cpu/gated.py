"""The gate of a gated feed-forward network: ``activation(first half) * second half``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.math import ACTIVATIONS, Vector
from sparsify.codegen.kernels.cpu.simd import Expr, arguments, bind, load, prim_func, store, symbol
from sparsify.codegen.kernels.cpu.tokens import Features, each_token, tensor
from sparsify.layouts import Form


@dataclass(frozen=True)
class Gated:
    """The kernel's specification; ``features`` are those of the result."""

    isa: Isa
    features: int
    activation: str
    form: Form

    @property
    def name(self) -> str:
        return f"gated_{self.form}_{self.isa.name}_{self.activation}_{self.features}"

    def build(self) -> Any:
        """A PrimFunc ``(x[.., 2 * features], y[.., features])``."""
        with prim_func(self.name) as result:
            count = symbol()
            x, y = arguments(
                tensor("x", self.form, count, 2 * self.features),
                tensor("y", self.form, count, self.features),
            )

            def gate(token: Features) -> None:
                first = token.base(2 * self.features)
                second = bind(first + self.features * token.step)
                target = token.base(self.features)

                def run(at: Expr, width: int) -> None:
                    opened = ACTIVATIONS[self.activation](Vector(load(x, first + at, width), width))
                    store(y, target + at, opened.value * load(x, second + at, width), width)

                token.along(self.features, run)

            each_token(self.isa, self.form, count, 2 * self.features, gate)
        return result[0]
