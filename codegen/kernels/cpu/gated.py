"""The gate of a gated feed-forward network: ``activation(first half) * second half``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.math import ACTIVATIONS, Vector
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    arguments,
    bind,
    load,
    prim_func,
    size_of,
    store,
    symbol,
)
from sparsify.codegen.kernels.cpu.tokens import Features, each_token, tensor
from sparsify.layouts import Form


@dataclass(frozen=True)
class Gated:
    """The kernel's specification; ``features`` are those of the result, None: any number."""

    isa: Isa
    features: int | None
    activation: str
    form: Form

    @property
    def name(self) -> str:
        features = self.features or "any"
        return f"gated_{self.form}_{self.isa.name}_{self.activation}_{features}"

    def build(self) -> Any:
        """A PrimFunc ``(x[.., 2 * features], y[.., features])``."""
        with prim_func(self.name) as result:
            count, features = symbol(), size_of(self.features)
            both = features * 2
            x, y = arguments(
                tensor("x", self.form, count, both if self.features else symbol()),
                tensor("y", self.form, count, features),
            )

            def gate(token: Features) -> None:
                first = token.base(both)
                second = bind(first + features * token.step)
                target = token.base(features)

                def run(at: Expr, width: int) -> None:
                    gate = Vector(load(x, first + at, width), width, self.isa)
                    opened = ACTIVATIONS[self.activation](gate).value
                    store(y, target + at, opened * load(x, second + at, width), width)

                token.along(features, run)

            each_token(self.isa, self.form, count, both, gate)
        return result[0]
