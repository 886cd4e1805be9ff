"""Sums over a token's features, which need not be in order: several run side by side."""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    bind,
    reduce_lanes,
    remainder,
    splat,
)

_PARTIAL_SUMS = 4
"""Independent sums, so that additions do not wait for each other."""


def sum_in_lanes(isa: Isa, features: int, term: Callable[[Expr], Expr]) -> Expr:
    """``term(feature)``, a vector of tokens, summed over the features."""
    partial = _zeros(isa)
    whole = features // _PARTIAL_SUMS
    with T.serial(T.int64(whole)) as step:
        for i in range(_PARTIAL_SUMS):
            partial[i] = partial[i] + term(step * _PARTIAL_SUMS + i)
    for i in range(features % _PARTIAL_SUMS):
        partial[i] = partial[i] + term(T.int64(whole * _PARTIAL_SUMS + i))
    return _joined(partial)


def sum_of_row(isa: Isa, features: int, term: Callable[[Expr, int], Expr]) -> Expr:
    """``term(feature, width)``, a vector of neighbouring features, summed to one number."""
    width = isa.vector
    partial = _zeros(isa)
    steps, rest = divmod(features // width, _PARTIAL_SUMS)
    with T.serial(T.int64(steps)) as step:
        for i in range(_PARTIAL_SUMS):
            partial[i] = partial[i] + term(bind((step * _PARTIAL_SUMS + i) * width), width)
    for i in range(rest):
        at = T.int64((steps * _PARTIAL_SUMS + i) * width)
        partial[i] = partial[i] + term(at, width)
    total = reduce_lanes(_joined(partial), width, _plus)
    for offset, narrow in remainder(features, width):
        total = total + reduce_lanes(bind(term(T.int64(offset), narrow)), narrow, _plus)
    return bind(total)


def _zeros(isa: Isa) -> Registers:
    partial = Registers(_PARTIAL_SUMS, isa.vector)
    for i in range(_PARTIAL_SUMS):
        partial[i] = splat(0.0, isa.vector)
    return partial


def _joined(partial: Registers) -> Expr:
    total = partial[0]
    for i in range(1, _PARTIAL_SUMS):
        total = total + partial[i]
    return bind(total)


def _plus(a: Expr, b: Expr) -> Expr:
    return a + b
