"""The rules of gates as kernels compute them.

Whole vectors at a time and in linear time, top-k too: the k-th largest score is found bit by bit,
by counting how many scores are not below a candidate. Scores lie in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.gates import Dropped, register_gate
from sparsify.codegen.kernels.cpu.gate import Token
from sparsify.codegen.kernels.cpu.math import Vector, float_type
from sparsify.codegen.kernels.cpu.simd import Expr, Registers, bind, splat
from sparsify.gates import ChannelThreshold, StatisticalTopK, Threshold, TopK, WeightedTopK

Scores = Callable[[Expr, int], Vector]
"""``scores(at, width)``, none of them negative."""


@dataclass(frozen=True)
class ThresholdKernels:
    gate = Threshold

    def dropped(self, gate: Threshold, token: Token) -> Dropped:
        limit = bind(token.parameters[0][0])
        return lambda at, width: _magnitude(token, at, width).value <= splat(limit, width)


@dataclass(frozen=True)
class ChannelThresholdKernels:
    gate = ChannelThreshold

    def dropped(self, gate: ChannelThreshold, token: Token) -> Dropped:
        return lambda at, width: (
            _magnitude(token, at, width).value <= token.of_feature(0, at, width).value
        )


@dataclass(frozen=True)
class TopKKernels:
    gate = TopK

    def dropped(self, gate: TopK, token: Token) -> Dropped:
        return _below_the_largest(token, lambda at, width: _magnitude(token, at, width), gate.k)


@dataclass(frozen=True)
class WeightedTopKKernels:
    gate = WeightedTopK

    def dropped(self, gate: WeightedTopK, token: Token) -> Dropped:
        return _below_the_largest(
            token,
            lambda at, width: _magnitude(token, at, width) * token.of_feature(0, at, width),
            gate.k,
        )


@dataclass(frozen=True)
class StatisticalTopKKernels:
    gate = StatisticalTopK

    def dropped(self, gate: StatisticalTopK, token: Token) -> Dropped:
        features = token.features
        mean = token.total(lambda at, width: token.value(at, width).value) * (1.0 / features)

        def square(at: Expr, width: int) -> Expr:
            centred = token.value(at, width) - Vector(token.spread(mean.value, width), width)
            return (centred * centred).value

        variance = token.total(square) * (1.0 / max(1, features - 1))
        limit = variance.call("llvm.sqrt").fma(gate.quantile(features), mean).value
        return lambda at, width: token.value(at, width).value <= token.spread(limit, width)


def _magnitude(token: Token, at: Expr, width: int) -> Vector:
    return token.value(at, width).call("llvm.fabs")


def _below_the_largest(token: Token, scores: Scores, k: int) -> Dropped:
    last = _nth_largest(token, scores, k)
    return lambda at, width: scores(at, width).value < token.spread(last, width)


def _nth_largest(token: Token, scores: Scores, n: int) -> Expr:
    """The largest number that at least ``n`` scores reach: the n-th largest score.

    Floats that are not negative are ordered as their bits are, so it is built from the highest
    bit down.
    """
    width = token.width
    floats = float_type(width)
    bits = floats.replace("float", "int")
    found = Registers(1, width)
    found[0] = splat(0.0, width)
    with T.serial(T.int32(31)) as step:
        bit = bind(T.int32(1) << (T.int32(30) - step))
        raised = bind(
            T.reinterpret(bits, found[0]) + (T.Broadcast(bit, width) if width > 1 else bit)
        )
        candidate = bind(T.reinterpret(floats, raised))

        def reached(at: Expr, lanes: int, candidate: Expr = candidate) -> Expr:
            enough = scores(at, lanes).value >= token.spread(candidate, lanes)
            return T.Select(enough, splat(1.0, lanes), splat(0.0, lanes))

        count = token.total(reached).value
        found[0] = T.Select(count >= splat(float(n), width), candidate, found[0])
    return bind(found[0])


for _kernels in (
    ThresholdKernels(),
    ChannelThresholdKernels(),
    TopKKernels(),
    WeightedTopKKernels(),
    StatisticalTopKKernels(),
):
    register_gate(_kernels)
