"""Routers: each token's experts and their weights.

for token:
  a key and a gate of each expert            # the rule of the router
  for slot: the expert with the largest key that is left; its gate is the weight
  weights are scaled

One template; a rule says what keys and gates are, when a token has enough experts, and how weights
are scaled. `register_rule` gives a router one; a router without is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.math import LOG2E, Vector, exp2
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Tensor,
    arguments,
    bind,
    prim_func,
    share,
    store,
    symbol,
)
from sparsify.routers import Router, parse

_CYCLES = 16
"""Elements of copying that one expert of one token takes as long as."""

NONE = float("-inf")
"""The key of an expert that cannot be chosen."""


@dataclass(frozen=True)
class Token:
    """What a rule works on: the logits of one token, and what it fills.

    Attributes:
        experts, width: how many there are, and logits of a token.
        keys, gates: of each expert, to be filled; a key of `NONE` keeps an expert out.
        parameters: the router's tensors.
    """

    experts: int
    width: int
    logits: Expr
    base: Expr
    keys: Expr
    gates: Expr
    parameters: tuple[Expr, ...]

    def logit(self, index: Expr | int) -> Expr:
        return self.logits[self.base + index]

    def each(self, body: Callable[[Expr], None]) -> None:
        """Runs ``body(expert)`` for each expert."""
        with T.serial(T.int64(self.experts)) as expert:
            body(expert)

    def total(self, start: float, term: Callable[[Expr, Expr], Expr]) -> Expr:
        """``total = term(expert, total)`` over all experts."""
        return folded(self.experts, start, term)

    def softmax(self, scaled: Callable[[Expr], Expr]) -> None:
        """Keys and gates are the softmax of ``scaled(logit)``."""
        most = self.total(NONE, lambda e, best: T.max(scaled(self.logit(e)), best))

        def power(expert: Expr) -> None:
            value = bind(exponential(scaled(self.logit(expert)) - most))
            store(self.gates, expert, value, 1)

        self.each(power)
        total = self.total(0.0, lambda e, sum_: sum_ + self.gates[e])

        def divide(expert: Expr) -> None:
            value = bind(self.gates[expert] / total)
            store(self.gates, expert, value, 1)
            store(self.keys, expert, value, 1)

        self.each(divide)


def folded(count: int, start: float, term: Callable[[Expr, Expr], Expr]) -> Expr:
    """``total = term(index, total)`` for each index below ``count``."""
    total = T.alloc_buffer((1,), "float32", scope="global")
    store(total, 0, T.float32(start), 1)
    with T.serial(T.int64(count)) as index:
        store(total, 0, term(index, total[0]), 1)
    return bind(total[0])


def exponential(x: Expr) -> Expr:
    return exp2(Vector(bind(x * T.float32(LOG2E)), 1)).value


def is_nan(x: Expr) -> Expr:
    """By its bits: TVM takes ``x != x`` for false."""
    magnitude = T.bitwise_and(T.reinterpret("int32", bind(x)), T.int32(0x7FFFFFFF))
    return magnitude > T.int32(0x7F800000)


class Rule:
    """What the kernel does for one kind of router; `Router.route` is its reference."""

    router: ClassVar[type[Router]]

    def __init__(self, router: Any) -> None:
        self.spec = router

    def fill(self, token: Token) -> None:
        """Fills keys and gates."""
        raise NotImplementedError

    def enough(self, token: Token, before: Expr) -> Expr | None:
        """Whether weights that add up to ``before`` are enough; None: only slots bound them."""
        return None

    def scale(self, token: Token, total: Expr) -> Expr | None:
        """What weights that add up to ``total`` are multiplied with; None: nothing."""
        return None


_RULES: dict[type[Router], type[Rule]] = {}


def register_rule(rule: type[Rule]) -> type[Rule]:
    """Class decorator: makes kernels for the rule's router."""
    known = _RULES.setdefault(rule.router, rule)
    if known is not rule:
        raise ValueError(f"router {rule.router.name!r} already has the rule {known}")
    return rule


def rule_of(router: Router) -> Rule | None:
    """The rule of a router; None where it has none."""
    from sparsify.codegen.kernels.cpu import route_rules  # noqa: F401  registers ours

    found = _RULES.get(type(router))
    return None if found is None else found(router)


@dataclass(frozen=True)
class Route:
    """The kernel's specification: the router's spec and how many logits a token has."""

    isa: Isa
    router: str
    width: int

    @property
    def name(self) -> str:
        kept = "".join(c if c.isalnum() else "_" for c in self.router.rstrip("}"))
        return f"route_{kept}_{self.width}"

    def build(self) -> Any:
        """A PrimFunc ``(logits[tokens, width], *parameters, experts[tokens, slots], weights)``."""
        router = parse(self.router)
        rule = rule_of(router)
        assert rule is not None, self.router
        count = router.experts(self.width)
        slots = router.slots(count)
        with prim_func(self.name) as result:
            tokens = symbol()
            logits, *parameters, experts, weights = arguments(
                Tensor("logits", (tokens, self.width)),
                *(
                    Tensor(n, s)
                    for n, s in zip(router.parameters, router.shapes(count), strict=True)
                ),
                Tensor("experts", (tokens, slots), "int32"),
                Tensor("weights", (tokens, slots)),
            )

            def one(number: Expr) -> None:
                keys, gates = (_scratch(count) for _ in range(2))
                base = bind(number * self.width)
                token = Token(count, self.width, logits, base, keys, gates, tuple(parameters))
                rule.fill(token)
                _select(token, rule, slots, bind(number * slots), experts, weights)

            share(tokens, tokens * (self.width * _CYCLES), one)
        return result[0]


def _scratch(count: int) -> Expr:
    return T.alloc_buffer((count,), "float32", scope="global" if count <= 128 else "local")


def _select(token: Token, rule: Rule, slots: int, at: Expr, experts: Expr, weights: Expr) -> None:
    """Takes the expert with the largest key for each slot, the first of equal ones."""

    def comparable(expert: Expr) -> None:
        # A token with NaN is sent somewhere, so that its result is NaN and not nothing.
        with T.If(is_nan(token.keys[expert])), T.Then():
            store(token.keys, expert, T.float32(float("inf")), 1)

    token.each(comparable)
    best, total = (T.alloc_buffer((1,), kind, scope="global") for kind in ("int32", "float32"))
    store(total, 0, T.float32(0), 1)
    with T.serial(T.int64(slots)) as slot:
        store(best, 0, T.int32(-1), 1)
        largest = T.alloc_buffer((1,), "float32", scope="global")
        store(largest, 0, T.float32(NONE), 1)

        def look(expert: Expr) -> None:
            with T.If(token.keys[expert] > largest[0]), T.Then():
                store(largest, 0, token.keys[expert], 1)
                store(best, 0, T.Cast("int32", expert), 1)

        token.each(look)
        enough = rule.enough(token, total[0])
        if enough is not None:
            with T.If(T.And(slot > 0, enough)), T.Then():
                store(best, 0, T.int32(-1), 1)
        store(experts, at + slot, best[0], 1)
        with T.If(best[0] >= 0):
            with T.Then():
                chosen = bind(T.Cast("int64", best[0]))
                weight = bind(token.gates[chosen])
                store(weights, at + slot, weight, 1)
                store(total, 0, total[0] + weight, 1)
                store(token.keys, chosen, T.float32(NONE), 1)
            with T.Else():
                store(weights, at + slot, T.float32(0), 1)
    factor = rule.scale(token, total[0])
    if factor is not None:
        named = bind(factor)
        with T.serial(T.int64(slots)) as slot:
            store(weights, at + slot, weights[at + slot] * named, 1)
