"""Layer and root-mean-square normalisation of rows with any number of features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.math import Vector
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Number,
    Registers,
    Tensor,
    along,
    arguments,
    bind,
    load,
    prim_func,
    reduce_lanes,
    share,
    splat,
    store,
    symbol,
)

_PARTIAL_SUMS = 4
"""Independent sums, so that additions do not wait for each other."""


@dataclass(frozen=True)
class GeneralNorm:
    """The kernel's specification; ``kind`` is ``layer`` or ``rms``."""

    isa: Isa
    kind: str

    @property
    def name(self) -> str:
        return f"general_{self.kind}_norm_{self.isa.name}"

    def build(self) -> Any:
        """A PrimFunc ``(x, weight[, bias], epsilon, y)``, a layer's with the bias."""
        layer = self.kind == "layer"
        with prim_func(self.name) as result:
            tokens, features = symbol(), symbol()
            x, weight, bias, epsilon, y = arguments(
                Tensor("x", (tokens, features)),
                Tensor("weight", (features,)),
                Tensor("bias", (features,)) if layer else None,
                Number("epsilon"),
                Tensor("y", (tokens, features)),
            )
            share_of = bind(T.float32(1.0) / T.Cast("float32", features))

            def normalise(token: Expr) -> None:
                base = bind(token * features)
                mean = None
                if layer:
                    total = self._sum(features, lambda at, width: load(x, base + at, width))
                    mean = bind(total * share_of)

                def centred(at: Expr, width: int) -> Expr:
                    value = load(x, base + at, width)
                    return value if mean is None else bind(value - splat(mean, width))

                def square(at: Expr, width: int) -> Expr:
                    value = bind(centred(at, width))
                    return value * value

                variance = Vector(
                    bind(self._sum(features, square) * share_of + epsilon), 1, self.isa
                )
                scale = bind(variance.call("llvm.sqrt").rdiv(1.0).value)

                def put(at: Expr, width: int) -> None:
                    value = centred(at, width) * splat(scale, width) * load(weight, at, width)
                    if bias is not None:
                        value = value + load(bias, at, width)
                    store(y, base + at, value, width)

                along(features, self.isa.vector, put)

            share(tokens, tokens * features, normalise)
        return result[0]

    def _sum(self, features: Expr, term: Callable[[Expr, int], Expr]) -> Expr:
        width = self.isa.vector
        partial, rest = Registers(_PARTIAL_SUMS, width), Registers(1, 1)
        partial.clear()
        rest.clear()
        vectors = bind(T.floordiv(features, width))
        steps = bind(T.floordiv(vectors, _PARTIAL_SUMS))
        with T.serial(steps) as step:
            for i in range(_PARTIAL_SUMS):
                at = bind((step * _PARTIAL_SUMS + i) * width)
                partial[i] = partial[i] + term(at, width)
        with T.serial(vectors - steps * _PARTIAL_SUMS) as step:
            at = bind((steps * _PARTIAL_SUMS + step) * width)
            partial[0] = partial[0] + term(at, width)
        with T.serial(features - vectors * width) as step:
            rest[0] = rest[0] + term(bind(vectors * width + step), 1)
        total = bind((partial[0] + partial[1]) + (partial[2] + partial[3]))
        return bind(reduce_lanes(total, width, lambda a, b: a + b) + rest[0])
