"""What the routing kernel does for each router; see `sparsify.routers` for what they mean."""

from __future__ import annotations

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.math import Vector, sigmoid
from sparsify.codegen.kernels.cpu.route import (
    NONE,
    Rule,
    Token,
    exponential,
    folded,
    is_nan,
    register_rule,
)
from sparsify.codegen.kernels.cpu.simd import Expr, bind, store
from sparsify.routers import (
    ReluNorm,
    SigmoidTopK,
    SoftmaxTopK,
    Temperature,
    Threshold,
    TopK,
    Tree,
)
from sparsify.routers.sigmoid import TINY
from sparsify.routers.tree import LEAST


@register_rule
class TopKRule(Rule):
    router = TopK

    def fill(self, token: Token) -> None:
        def expert(number: Expr) -> None:
            # A logit that is NaN makes the weight NaN, any other leaves it one.
            logit = bind(token.logit(number))
            store(token.keys, number, logit, 1)
            gate = T.if_then_else(is_nan(logit), logit, T.float32(1))
            store(token.gates, number, gate, 1)

        token.each(expert)


@register_rule
class SoftmaxRule(Rule):
    router = SoftmaxTopK

    def fill(self, token: Token) -> None:
        token.softmax(lambda logit: logit)

    def scale(self, token: Token, total: Expr) -> Expr | None:
        return T.float32(1) / total if self.spec.normalise else None


@register_rule
class SigmoidRule(Rule):
    router = SigmoidTopK

    def fill(self, token: Token) -> None:
        bias = token.parameters[0]

        def expert(number: Expr) -> None:
            score = bind(sigmoid(Vector(bind(token.logit(number)), 1)).value)
            store(token.gates, number, score, 1)
            store(token.keys, number, score + bias[number], 1)

        token.each(expert)
        if self.spec.groups > 1:
            self._keep_groups(token)

    def _keep_groups(self, token: Token) -> None:
        groups, size = self.spec.groups, token.experts // self.spec.groups
        worth = T.alloc_buffer((groups,), "float32", scope="global")
        with T.serial(T.int64(groups)) as group:
            first = folded(size, NONE, lambda i, m: T.max(token.keys[group * size + i], m))
            store(worth, group, first, 1)
            if size > 1:
                # The second best is the best but for one occurrence of the first.
                seen = T.alloc_buffer((1,), "int32", scope="global")
                second = T.alloc_buffer((1,), "float32", scope="global")
                store(seen, 0, T.int32(0), 1)
                store(second, 0, T.float32(NONE), 1)
                with T.serial(T.int64(size)) as i:
                    key = bind(token.keys[group * size + i])
                    with T.If(T.And(key == first, seen[0] == 0)):
                        with T.Then():
                            store(seen, 0, T.int32(1), 1)
                        with T.Else():
                            store(second, 0, T.max(key, second[0]), 1)
                store(worth, group, first + second[0], 1)
        with T.serial(T.int64(groups)) as group:
            better = folded(
                groups,
                0.0,
                lambda other, count: (
                    count
                    + T.Cast(
                        "float32",
                        T.Or(
                            worth[other] > worth[group],
                            T.And(worth[other] == worth[group], other < group),
                        ),
                    )
                ),
            )
            with (
                T.If(better >= T.float32(self.spec.kept)),
                T.Then(),
                T.serial(T.int64(size)) as i,
            ):
                store(token.keys, group * size + i, T.float32(NONE), 1)

    def scale(self, token: Token, total: Expr) -> Expr | None:
        scale = token.parameters[1][0]
        return scale / (total + T.float32(TINY)) if self.spec.normalise else scale


@register_rule
class ThresholdRule(Rule):
    router = Threshold

    def fill(self, token: Token) -> None:
        token.softmax(lambda logit: logit)

    def enough(self, token: Token, before: Expr) -> Expr | None:
        return before >= token.parameters[0][0]


@register_rule
class TemperatureRule(Rule):
    router = Temperature

    def fill(self, token: Token) -> None:
        temperature, threshold = token.parameters
        token.softmax(lambda logit: logit / temperature[0])
        most = token.total(NONE, lambda e, best: T.max(token.gates[e], best))
        # Of equal ones the first is the most probable, and the only one that needs no threshold.
        first = token.total(
            float(token.experts),
            lambda e, least: T.if_then_else(
                token.gates[e] == most, T.min(T.Cast("float32", e), least), least
            ),
        )

        def expert(number: Expr) -> None:
            gate = bind(token.gates[number])
            other = T.Cast("float32", number) > first
            with T.If(T.And(gate <= threshold[0], T.Or(gate < most, other))), T.Then():
                store(token.keys, number, T.float32(NONE), 1)

        token.each(expert)


@register_rule
class ReluNormRule(Rule):
    router = ReluNorm

    def fill(self, token: Token) -> None:
        weight, epsilon = token.parameters

        def kept(number: Expr) -> Expr:
            return Vector(bind(token.logit(number)), 1).max(0.0).value

        squares = token.total(0.0, lambda e, total: kept(e) * kept(e) + total)
        mean = bind(squares / T.float32(token.experts) + epsilon[0])
        inverse = bind(T.float32(1) / T.sqrt(mean))

        def expert(number: Expr) -> None:
            value = bind(kept(number))
            store(token.gates, number, value * inverse * weight[number], 1)
            key = T.if_then_else(value <= T.float32(0), T.float32(NONE), value)
            store(token.keys, number, key, 1)

        token.each(expert)


@register_rule
class TreeRule(Rule):
    router = Tree

    def fill(self, token: Token) -> None:
        """A leaf's probability is made anew where it is needed: nothing but the gates is kept.

        Comparisons are such that NaN takes the way of a number.
        """
        count, each = token.experts, token.width // self.spec.trees
        nothing = T.float32(0)

        def score(tree: int, expert: Expr) -> Expr:
            return token.logit(tree * each + count - 1 + expert)

        most: Expr = T.float32(NONE)
        for tree in range(self.spec.trees):

            def higher(expert: Expr, best: Expr, tree: int = tree) -> Expr:
                reached = self._reached(token, tree * each, expert)
                return T.if_then_else(reached <= nothing, best, T.max(score(tree, expert), best))

            most = bind(T.max(most, token.total(NONE, higher)))

        def part(expert: Expr) -> None:
            gate: Expr = nothing
            for tree in range(self.spec.trees):
                reached = bind(self._reached(token, tree * each, expert))
                worth = bind(exponential(score(tree, expert) - most))
                # What no tree leads to counts nothing, however large its score.
                gate = bind(gate + T.if_then_else(reached <= nothing, nothing, reached * worth))
            store(token.gates, expert, gate, 1)

        token.each(part)
        largest = token.total(0.0, lambda e, best: T.max(token.gates[e], best))
        least = bind(largest * T.float32(LEAST))

        def keep(expert: Expr) -> None:
            gate = bind(token.gates[expert])
            store(token.keys, expert, T.if_then_else(gate <= least, T.float32(NONE), gate), 1)

        token.each(keep)

    def _reached(self, token: Token, base: int, leaf: Expr) -> Expr:
        """The probability that a tree leads to a leaf."""
        gamma, levels = token.parameters[0][0], token.experts.bit_length() - 1
        probability: Expr = T.float32(1)
        for level in range(levels):
            shift = levels - level
            node = bind(T.int64((1 << level) - 1 + base) + T.shift_right(leaf, T.int64(shift)))
            u = Vector(bind(token.logit(node) / gamma), 1).clamp(-0.5, 0.5)
            left = bind(((u * u) * u * -2.0 + u * 1.5 + 0.5).value)
            right = bind(T.bitwise_and(T.shift_right(leaf, T.int64(shift - 1)), T.int64(1)))
            share = T.if_then_else(right == 1, T.float32(1) - left, left)
            probability = bind(probability * share)
        return probability

    def scale(self, token: Token, total: Expr) -> Expr | None:
        return T.float32(1) / total
