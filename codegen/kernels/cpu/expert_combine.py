"""What experts made of a token, added up with the weights that its router gave them.

for token: y[token, :] = sum over its slots of weight * result[place, :]

Each token reads its own results, in the order of its slots: no two tasks add to one place, and sums
do not depend on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.expert_plan import Plan
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Tensor,
    along,
    arguments,
    bind,
    load,
    prim_func,
    share,
    splat,
    store,
    symbol,
)


@dataclass(frozen=True)
class ExpertCombine:
    """The kernel's specification.

    Attributes:
        features: of a result; ``pitch`` floats lie from one to the next.
    """

    isa: Isa
    experts: int
    slots: int
    features: int
    pitch: int

    @property
    def name(self) -> str:
        return (
            f"expert_combine_{self.isa.name}_{self.experts}x{self.slots}"
            f"_{self.features}of{self.pitch}"
        )

    def build(self) -> Any:
        """A PrimFunc ``(results[positions, pitch], plan, weights[tokens, slots], y)``."""
        with prim_func(self.name) as result:
            positions, length, tokens = symbol(), symbol(), symbol()
            results, buffer, weights, y = arguments(
                Tensor("results", (positions, self.pitch)),
                Tensor("plan", (length,), "int32"),
                Tensor("weights", (tokens, self.slots)),
                Tensor("y", (tokens, self.features)),
            )
            plan = Plan(self.experts, buffer, positions)

            def token(number: Expr) -> None:
                target = bind(number * self.features)
                self._each(y, target, lambda at, width: splat(0.0, width))
                with T.serial(T.int64(self.slots)) as slot:
                    pair = bind(number * self.slots + slot)
                    place = bind(plan.place(pair))
                    with T.If(place >= 0), T.Then():
                        source, weight = bind(place * self.pitch), bind(weights[pair])
                        self._each(
                            y,
                            target,
                            lambda at, width: (
                                load(y, target + at, width)
                                + splat(weight, width) * load(results, source + at, width)
                            ),
                        )

            share(tokens, tokens * (self.features * self.slots), token)
        return result[0]

    def _each(self, y: Expr, target: Expr, value: Any) -> None:
        along(
            self.features,
            self.isa.vector,
            lambda at, width: store(y, target + at, value(at, width), width),
        )
