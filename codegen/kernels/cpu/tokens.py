"""Kernels that treat every token alike, written once for rows and for lanes.

In rows a token's features are contiguous, and vectors run along them. In lanes a vector is one
feature of several tokens, and the next feature lies 16 floats on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    LaneTile,
    Tensor,
    along,
    bind,
    i64,
    share,
    tiled_tasks,
)
from sparsify.layouts import LANES, Form


@dataclass(frozen=True)
class Features:
    """The features of one token, or in lanes of one vector of tokens.

    Attributes:
        base: offset of feature 0 in a tensor of so many features.
        step: from one feature to the next.
    """

    isa: Isa
    base: Callable[[Expr | int], Expr]
    step: int

    def along(self, count: Expr | int, body: Callable[[Expr, int], None]) -> None:
        """Runs ``body(offset from feature 0, vector width)`` over ``count`` features."""
        if self.step == 1:
            along(count, self.isa.vector, body)
        else:
            with T.serial(i64(count)) as feature:
                body(bind(feature * self.step), self.isa.vector)


def tensor(name: str, form: Form, count: Expr, features: Expr | int) -> Tensor:
    """``[tokens, features]`` or ``[groups, features, 16]``, ``count`` being the first extent."""
    return Tensor(name, (count, features) if form == "rows" else (count, features, LANES))


def each_token(
    isa: Isa, form: Form, count: Expr, features: Expr | int, body: Callable[[Features], None]
) -> None:
    """Runs ``body`` for every token, or vector of tokens, of a tensor with so many features."""

    def row(token: Expr) -> None:
        body(Features(isa, lambda features: bind(token * features), 1))

    def lanes(tile: LaneTile, index: Expr, _: Expr) -> None:
        body(Features(isa, lambda features: bind(tile.base(index, features)), LANES))

    if form == "rows":
        share(count, count * features, row)
    else:
        tiled_tasks(isa, count, 1, 1, lanes)
