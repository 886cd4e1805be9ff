"""Elementary functions on vectors, as polynomials: no calls, few divisions.

Errors are stated for fp32 against float64, and checked by tests/codegen/kernels/test_math.py. NaN
stays NaN throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.simd import Expr, bind, intrinsic, splat

LOG2E = 1.4426950408889634
_GELU_TANH = 2.0 * 0.7978845608028654

_EXP2 = (
    0.00132669704, 0.00967545975, 0.0555074262, 0.240221218, 0.693146949, 1.00000007,
)  # fmt: skip
"""2**x on -0.5..0.5: Chebyshev fit weighted for relative error."""

_EXP2_UPWARDS = (
    0.00187757658, 0.00898934063, 0.0558263175, 0.240153611, 0.693153083, 0.99999994,
)  # fmt: skip
"""2**x on 0..1, likewise."""

_NORMAL_CDF_LIMIT = 5.4
_SEGMENTS = 32
_NORMAL_CDF_SLOPE = (
    -0.000697790194, 0.00204031919, -0.00214325797, 0.0023358295, -0.00566511729,
    0.0103715078, -0.0145076337, 0.0194527499, -0.0256119387, 0.0321395075,
    -0.0392207338, 0.0484986725, -0.0653276549, 0.130928117,
)  # fmt: skip
"""(Phi(x) - 1/2) / x on |x| <= 5.4 as a polynomial in 2 x^2 / 5.4^2 - 1, Phi the normal
distribution function: Chebyshev fit weighted by x^2."""


class Vector:
    """A vector of fp32 with operators; numbers are spread over the lanes, results are named.

    ``isa`` says which instructions there are besides those that every CPU has.
    """

    def __init__(self, value: Expr, width: int, isa: Isa | None = None) -> None:
        self.value = value
        self.width = width
        self.isa = isa

    def map(self, function: Callable[..., Expr], *others: Vector | float) -> Vector:
        operands = [o.value if isinstance(o, Vector) else splat(o, self.width) for o in others]
        return Vector(bind(function(self.value, *operands)), self.width, self.isa)

    def __add__(self, other: Vector | float) -> Vector:
        return self.map(lambda a, b: a + b, other)

    def __sub__(self, other: Vector | float) -> Vector:
        return self.map(lambda a, b: a - b, other)

    def __mul__(self, other: Vector | float) -> Vector:
        return self.map(lambda a, b: a * b, other)

    def fma(self, factor: Vector | float, addend: Vector | float) -> Vector:
        """self * factor + addend."""
        return self.map(lambda a, b, c: a * b + c, factor, addend)

    def rdiv(self, numerator: float) -> Vector:
        """numerator / self."""
        return self.map(lambda a, b: b / a, numerator)

    @property
    def _has_extremes(self) -> bool:
        return self.isa is not None and self.isa.nan_extremes and self.width > 1

    def max(self, other: Vector | float) -> Vector:
        if self._has_extremes:
            return self.call("llvm.maximum", other)
        # Of two operands that do not compare, the second is taken: NaN stays NaN.
        return self.map(lambda a, b: T.max(b, a), other)

    def clamp(self, low: float, high: float) -> Vector:
        if self._has_extremes:
            return self.call("llvm.minimum", high).call("llvm.maximum", low)
        return self.map(lambda a, b, c: T.max(c, T.min(b, a)), high, low)

    def call(self, name: str, *others: Vector | float) -> Vector:
        """An LLVM intrinsic."""
        return self.map(lambda *a: intrinsic(float_type(self.width), name, *a), *others)


def polynomial(x: Vector, coefficients: Sequence[float]) -> Vector:
    """Horner's scheme; coefficients from the highest power down."""
    if x.isa is not None and x.isa.overwrites_addend and len(coefficients) > 3:
        return _polynomial_by_pairs(x, coefficients)
    value = x.fma(coefficients[0], coefficients[1])
    for coefficient in coefficients[2:]:
        value = value.fma(x, coefficient)
    return value


def _polynomial_by_pairs(x: Vector, coefficients: Sequence[float]) -> Vector:
    """Horner's scheme in the square: where multiply-adds overwrite the addend, a constant has to be
    copied first, and here only every second addend is one."""
    square = x * x
    odd = len(coefficients) % 2
    value = x.fma(coefficients[odd], coefficients[odd + 1])
    if odd:
        value = square.fma(coefficients[0], value)
    for at in range(odd + 2, len(coefficients), 2):
        value = value.fma(square, x.fma(coefficients[at], coefficients[at + 1]))
    return value


def exp2(x: Vector) -> Vector:
    """2**x, clamped to 2**-126 below and 2**126 above; relative error 2.5e-7 in between."""
    x = x.clamp(-126.0, 126.0)
    whole = x.call("llvm.rint")
    power = polynomial(x - whole, _EXP2)
    return power.map(lambda p, n: _raised(p, n, x.width), whole)


def exp2_below(x: Vector) -> Vector:
    """2**x for x <= 0; below 2**-126, at most that; relative error 2.5e-7.

    AVX-512 splits a number and scales by a power of two in one instruction each, infinities
    included: seven instructions instead of twelve.
    """
    if x.width != 16:
        return exp2(x)
    # What rounding down leaves; the scale is rounded down as well.
    rest = _masked("reduce", x.value, T.int32(1))
    return _masked("scalef", polynomial(rest, _EXP2_UPWARDS).value, x.value)


def _masked(name: str, *operands: Expr) -> Vector:
    """An AVX-512 instruction on all lanes, in the current rounding mode."""
    full = (T.Broadcast(T.float32(0.0), 16), T.int16(-1), T.int32(4))
    name = f"llvm.x86.avx512.mask.{name}.ps.512"
    return Vector(bind(intrinsic("float32x16", name, *operands, *full)), 16)


def gelu(x: Vector) -> Vector:
    """x Phi(x) with the exact normal distribution; absolute error 2e-6 up to |x| = 8."""
    if x.width == 16:
        return _gelu_by_table(x)
    bounded = x.clamp(-_NORMAL_CDF_LIMIT, _NORMAL_CDF_LIMIT)
    argument = (bounded * bounded).fma(2.0 / _NORMAL_CDF_LIMIT**2, -1.0)
    return x * bounded.fma(polynomial(argument, _NORMAL_CDF_SLOPE), 0.5)


def _gelu_by_table(x: Vector) -> Vector:
    """AVX-512 looks coefficients up in registers: a cubic for each of 32 segments of |x|.

    Half the multiply-adds of one polynomial over the whole range.
    """
    magnitude = x.call("llvm.fabs")
    place = magnitude.map(T.min, _NORMAL_CDF_LIMIT * (1 - 1e-6)) * (_SEGMENTS / _NORMAL_CDF_LIMIT)
    segment = bind(T.Cast("int32x16", place.value))
    rest = place - Vector(bind(T.Cast("float32x16", segment)), 16, x.isa)
    cubic = [Vector(_looked_up(column, segment), 16, x.isa) for column in _normal_cdf_cubics().T]
    above_half = cubic[0].fma(rest, cubic[1]).fma(rest, cubic[2]).fma(rest, cubic[3])
    return x.fma(0.5, magnitude * above_half)


def _looked_up(table: Sequence[float], index: Expr) -> Expr:
    halves = [
        T.Shuffle([T.float32(float(value)) for value in half], list(range(16)))
        for half in (table[:16], table[16:])
    ]
    name = "llvm.x86.avx512.vpermi2var.ps.512"
    return bind(intrinsic("float32x16", name, halves[0], index, halves[1]))


@cache
def _normal_cdf_cubics() -> np.ndarray:
    """Phi(x) - 1/2 on each segment, ``[segments, 4]``: coefficients of the place in the segment,
    from the highest power down, interpolated at Chebyshev nodes."""
    nodes = (np.cos(np.pi * (np.arange(64) + 0.5) / 64) + 1) / 2
    width = _NORMAL_CDF_LIMIT / _SEGMENTS
    return np.array(
        [
            np.polyfit(nodes, [math.erf((i + r) * width / math.sqrt(2)) / 2 for r in nodes], 3)
            for i in range(_SEGMENTS)
        ]
    )


def sigmoid(x: Vector) -> Vector:
    """1 / (1 + exp(-x)); absolute error 2e-7."""
    return (exp2(x * -LOG2E) + 1.0).rdiv(1.0)


def tanh(x: Vector) -> Vector:
    """2 sigmoid(2x) - 1; absolute error 3e-7."""
    return sigmoid(x + x).fma(2.0, -1.0)


def gelu_tanh(x: Vector) -> Vector:
    """The tanh approximation: x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)); absolute error
    2e-7 max(1, |x|)."""
    inner = (x * x).fma(0.044715 * _GELU_TANH, _GELU_TANH)
    return x * sigmoid(x * inner)


def silu(x: Vector) -> Vector:
    """x sigmoid(x); absolute error 2e-7 max(1, |x|)."""
    return x * sigmoid(x)


def relu(x: Vector) -> Vector:
    return x.max(0.0)


ACTIVATIONS: dict[str, Callable[[Vector], Vector]] = {
    "none": lambda x: x,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "tanh": tanh,
}
"""By the names of `sparsify.ops.ACTIVATIONS`."""


def float_type(width: int) -> str:
    return f"float32x{width}" if width > 1 else "float32"


def _raised(power: Expr, whole: Expr, width: int) -> Expr:
    """power * 2**whole, by adding to the exponent's bits."""
    bits = f"int32x{width}" if width > 1 else "int32"
    places = T.Broadcast(T.int32(23), width) if width > 1 else T.int32(23)
    exponent = bind(T.Cast(bits, whole) << places)
    return T.reinterpret(float_type(width), bind(T.reinterpret(bits, power) + exponent))
