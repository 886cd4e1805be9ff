"""Rotary position embedding: the two halves of each head, turned by the token's angles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    arguments,
    bind,
    i64,
    load,
    prim_func,
    size_of,
    store,
    symbol,
)
from sparsify.codegen.kernels.cpu.tokens import Features, each_token, tensor
from sparsify.layouts import Form


@dataclass(frozen=True)
class Rotary:
    """The kernel's specification; features after the ``heads`` heads are copied.

    Sizes that are None come with each call, the number of heads as an argument before ``y``.
    """

    isa: Isa
    heads: int | None
    head_dim: int | None
    features: int | None
    form: Form

    @property
    def name(self) -> str:
        heads = "any"
        if self.heads is not None:
            heads = f"h{self.heads}_{self.head_dim}_{self.features}"
        return f"rotary_{self.form}_{self.isa.name}_{heads}"

    def build(self) -> Any:
        """A PrimFunc ``(x[.., features], cos[.., head_dim], sin[.., head_dim][, heads], y)``."""
        with prim_func(self.name) as result:
            count = symbol()
            features, head_dim = size_of(self.features), size_of(self.head_dim)
            x, cos, sin, given, y = arguments(
                tensor("x", self.form, count, features),
                tensor("cos", self.form, count, head_dim),
                tensor("sin", self.form, count, head_dim),
                Integer("heads") if self.heads is None else None,
                tensor("y", self.form, count, features),
            )
            heads = i64(given if self.heads is None else self.heads)
            half = head_dim // 2 if isinstance(head_dim, int) else bind(T.floordiv(head_dim, 2))
            turned = (given if self.heads is None else self.heads) * head_dim

            def turn(token: Features) -> None:
                base, angle = token.base(features), token.base(head_dim)
                second = half * token.step
                with T.serial(heads) as head:
                    first = bind(base + head * (head_dim * token.step))

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

                token.along(features - turned, copy)

            each_token(self.isa, self.form, count, features, turn)
        return result[0]
