"""Rotary position embedding: the two halves of each head, turned by the token's angles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.simd import Expr, arguments, bind, load, prim_func, store, symbol
from sparsify.codegen.kernels.cpu.tokens import Features, each_token, tensor
from sparsify.layouts import Form


@dataclass(frozen=True)
class Rotary:
    """The kernel's specification; features after the ``heads`` heads are copied."""

    isa: Isa
    heads: int
    head_dim: int
    features: int
    form: Form

    @property
    def name(self) -> str:
        heads = f"h{self.heads}_{self.head_dim}_{self.features}"
        return f"rotary_{self.form}_{self.isa.name}_{heads}"

    def build(self) -> Any:
        """A PrimFunc ``(x[.., features], cos[.., head_dim], sin[.., head_dim], y)``."""
        with prim_func(self.name) as result:
            count = symbol()
            x, cos, sin, y = arguments(
                tensor("x", self.form, count, self.features),
                tensor("cos", self.form, count, self.head_dim),
                tensor("sin", self.form, count, self.head_dim),
                tensor("y", self.form, count, self.features),
            )
            half, turned = self.head_dim // 2, self.heads * self.head_dim

            def turn(token: Features) -> None:
                base, angle = token.base(self.features), token.base(self.head_dim)
                second = half * token.step
                with T.serial(T.int64(self.heads)) as head:
                    first = bind(base + head * (self.head_dim * token.step))

                    def pair(at: Expr, width: int) -> None:
                        a = bind(load(x, first + at, width))
                        b = bind(load(x, first + second + at, width))
                        c, s = (bind(load(t, angle + at, width)) for t in (cos, sin))
                        store(y, first + at, a * c - b * s, width)
                        c, s = (bind(load(t, angle + second + at, width)) for t in (cos, sin))
                        store(y, first + second + at, b * c + a * s, width)

                    token.along(half, pair)
                rest = bind(base + turned * token.step)

                def copy(at: Expr, width: int) -> None:
                    store(y, rest + at, load(x, rest + at, width), width)

                token.along(self.features - turned, copy)

            each_token(self.isa, self.form, count, self.features, turn)
        return result[0]
