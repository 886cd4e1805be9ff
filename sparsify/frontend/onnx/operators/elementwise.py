"""Elementwise arithmetic, comparison and logic, with NumPy's broadcasting.

Written on sizes too, for what exporters calculate with them.
"""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np
import torch

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import Unsupported, operator
from sparsify.frontend.onnx.unsigned import signed
from sparsify.frontend.onnx.values import SYMBOLIC, Constant, elementwise

Operand = torch.Tensor | Constant
_WRAPS_AROUND = (
    "Add",
    "Sub",
    "Mul",
    "Equal",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "BitwiseNot",
)


def operand(node: Node, value: Operand, other: Operand) -> Any:
    """An operand for PyTorch: a Python number for one constant element that broadcasts.

    Passes know scales and epsilons by being numbers, and a number in the graph costs no load.
    """
    if not isinstance(value, Constant):
        return value
    single = value.tensor.numel() == 1
    if single and isinstance(other, torch.Tensor) and value.tensor.dim() <= other.dim():
        return value.item()
    return node.parameter(value)


def _binary(
    names: str,
    compute: Callable[[Any, Any], Any],
    on_sizes: Callable[[Any, Any], Any] | None = None,
) -> None:
    """Registers operators of two operands; ``on_sizes`` takes two numbers."""

    @operator(
        *names.split(),
        since=7,
        constants=("a", "b"),
        on_sizes=None if on_sizes is None else lambda node, a, b: elementwise(on_sizes, a, b),
    )
    @partial(signed, wraps_around=_WRAPS_AROUND)
    def run(node: Node, a: Operand, b: Operand) -> torch.Tensor:
        return compute(operand(node, a, b), operand(node, b, a))


def _is_float(a: Any, b: Any) -> bool:
    return bool((a if isinstance(a, torch.Tensor) else b).is_floating_point())


def _divide(a: Any, b: Any) -> torch.Tensor:
    """Integers are divided towards zero."""
    return a / b if _is_float(a, b) else torch.div(_tensor(a, b), b, rounding_mode="trunc")


def _tensor(value: Any, like: Any) -> torch.Tensor:
    """A number as a tensor of the type of ``like``, where PyTorch takes no number."""
    return value if isinstance(value, torch.Tensor) else torch.full((), value, dtype=like.dtype)


def _divide_sizes(a: Any, b: Any) -> Any:
    """Sizes are not negative, so rounding down is rounding towards zero."""
    floats = any(isinstance(x, float | torch.SymFloat) for x in (a, b))
    return a / b if floats else a // b


def _compare(a: Any, b: Any, compute: Callable[[Any, Any], Any]) -> torch.Tensor:
    return compute(a, b) if isinstance(a, torch.Tensor) else compute(_tensor(a, b), b)


_binary("Add", python.add, python.add)
_binary("Sub", python.sub, python.sub)
_binary("Mul", python.mul, python.mul)
_binary("Div", _divide, _divide_sizes)
_binary("And", lambda a, b: torch.logical_and(_tensor(a, b), _tensor(b, a)), python.and_)
_binary("Or", lambda a, b: torch.logical_or(_tensor(a, b), _tensor(b, a)), python.or_)
_binary("Xor", lambda a, b: torch.logical_xor(_tensor(a, b), _tensor(b, a)))
_binary("Equal", lambda a, b: _compare(a, b, torch.eq), python.eq)
_binary("Greater", lambda a, b: _compare(a, b, torch.gt), python.gt)
_binary("GreaterOrEqual", lambda a, b: _compare(a, b, torch.ge), python.ge)
_binary("Less", lambda a, b: _compare(a, b, torch.lt), python.lt)
_binary("LessOrEqual", lambda a, b: _compare(a, b, torch.le), python.le)
_binary("BitwiseAnd", python.and_)
_binary("BitwiseOr", python.or_)
_binary("BitwiseXor", python.xor)


@operator("BitShift", since=11, constants=("a", "b"))
@signed
def bit_shift(node: Node, a: Operand, b: Operand) -> torch.Tensor:
    left, right = operand(node, a, b), operand(node, b, a)
    shift = python.lshift if node.require("direction") == "LEFT" else python.rshift
    return shift(left, right)


@operator("Pow", since=7, constants=("a", "b"), on_sizes=lambda n, a, b: elementwise(pow, a, b))
def power(node: Node, a: Operand, b: Operand) -> torch.Tensor:
    """The result has the type of the base."""
    base, exponent = operand(node, a, b), operand(node, b, a)
    if isinstance(base, torch.Tensor) and not base.is_floating_point():
        # Integers to a power of another type are computed in double and cut.
        if isinstance(exponent, float) and exponent.is_integer() and exponent >= 0:
            exponent = int(exponent)
        return torch.pow(base, exponent).to(base.dtype)
    dtype = base.dtype if isinstance(base, torch.Tensor) else _dtype(a)
    return torch.pow(base, exponent).to(dtype)


def _dtype(value: Operand) -> torch.dtype:
    return value.tensor.dtype if isinstance(value, Constant) else value.dtype


@operator(
    "Mod", since=10, constants=("a", "b"), on_sizes=lambda n, a, b: elementwise(python.mod, a, b)
)
@signed
def modulo(node: Node, a: Operand, b: Operand) -> torch.Tensor:
    """The sign of the divisor, or with ``fmod`` that of the dividend."""
    compute = torch.fmod if node.get("fmod", 0) else torch.remainder
    left, right = operand(node, a, b), operand(node, b, a)
    return compute(_tensor(left, right), right)


@operator(
    "Where",
    since=9,
    constants=("a", "b"),
    on_sizes=lambda node, condition, a, b: elementwise(_choose, condition, a, b),
)
def where(node: Node, condition: torch.Tensor, a: Operand, b: Operand) -> torch.Tensor:
    left = operand(node, a, b if isinstance(b, torch.Tensor) else condition)
    right = operand(node, b, a if isinstance(a, torch.Tensor) else condition)
    if not isinstance(left, torch.Tensor) and not isinstance(right, torch.Tensor):
        left = torch.full((), left, dtype=_dtype(a))
    return torch.where(condition, left, right)


def _choose(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, torch.SymBool):
        return torch.sym_ite(condition, a, b)
    return a if condition else b


def _variadic(name: str, compute: Callable[[Any, Any], Any], on_sizes: Any = None) -> None:
    """Registers an operator of any number of operands."""

    @operator(
        name,
        since=6,
        constants=("operands",),
        on_sizes=None
        if on_sizes is None
        else lambda n, *x: reduce(lambda a, b: elementwise(on_sizes, a, b), x),
    )
    @signed
    def run(node: Node, *operands: Operand) -> torch.Tensor:
        first, *others = sorted(operands, key=lambda x: isinstance(x, Constant))
        start = node.parameter(first) if isinstance(first, Constant) else first
        return reduce(lambda a, b: compute(a, operand(node, b, a)), others, start)


def _maximum(a: torch.Tensor, b: Any) -> torch.Tensor:
    return torch.maximum(a, b) if isinstance(b, torch.Tensor) else a.clamp(min=b)


def _minimum(a: torch.Tensor, b: Any) -> torch.Tensor:
    return torch.minimum(a, b) if isinstance(b, torch.Tensor) else a.clamp(max=b)


_variadic("Max", _maximum, torch.sym_max)
_variadic("Min", _minimum, torch.sym_min)
_variadic("Sum", python.add, python.add)


@operator("Mean", since=6)
def mean(node: Node, *operands: torch.Tensor) -> torch.Tensor:
    return reduce(python.add, operands) / len(operands)


def _unary(name: str, compute: Callable[[Any], Any], on_sizes: Any = None) -> None:
    @operator(name, on_sizes=None if on_sizes is None else lambda n, x: elementwise(on_sizes, x))
    @partial(signed, wraps_around=_WRAPS_AROUND)
    def run(node: Node, x: torch.Tensor) -> torch.Tensor:
        return compute(x)


def _rounded(towards: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Rounds a float of sizes; the result is a float in ONNX."""
    return lambda x: torch.sym_float(towards(x)) if isinstance(x, SYMBOLIC) else float(towards(x))


_unary("Abs", torch.abs, abs)
_unary("Neg", torch.neg, python.neg)
_unary("Not", torch.logical_not, torch.sym_not)
_unary("Ceil", torch.ceil, _rounded(math.ceil))
_unary("Floor", torch.floor, _rounded(math.floor))
_unary("Round", torch.round)
_unary("Sign", torch.sign)
_unary("Sqrt", torch.sqrt, torch.sym_sqrt)
_unary("Reciprocal", torch.reciprocal)
_unary("Exp", torch.exp)
_unary("Log", torch.log)
_unary("Erf", torch.erf)
_unary("Sin", torch.sin)
_unary("Cos", torch.cos)
_unary("Tan", torch.tan)
_unary("Asin", torch.asin)
_unary("Acos", torch.acos)
_unary("Atan", torch.atan)
_unary("Sinh", torch.sinh)
_unary("Cosh", torch.cosh)
_unary("Asinh", torch.asinh)
_unary("Acosh", torch.acosh)
_unary("Atanh", torch.atanh)
_unary("BitwiseNot", torch.bitwise_not)
_unary("IsNaN", torch.isnan)


@operator("IsInf", since=10)
def is_infinite(node: Node, x: torch.Tensor) -> torch.Tensor:
    positive, negative = node.get("detect_positive", 1), node.get("detect_negative", 1)
    if positive and negative:
        return torch.isinf(x)
    if not positive and not negative:
        return torch.zeros_like(x, dtype=torch.bool)
    return x == (math.inf if positive else -math.inf)


@operator("Clip", host=("lowest", "highest"))
def clip(node: Node, x: torch.Tensor, lowest: Any = None, highest: Any = None) -> torch.Tensor:
    """Bounds are attributes up to version 10, inputs from 11 on."""
    low = node.get("min") if lowest is None else lowest.item()
    high = node.get("max") if highest is None else highest.item()
    if low is not None and high is not None and low > high:
        low = high  # the upper bound is applied last
    if low is None and high is None:
        return x
    if low == 0 and high is None:
        return torch.relu(x)
    return x.clamp(low, high)


@operator("Identity", constants=("x",), on_sizes=lambda node, x: x)
def identity(node: Node, x: Operand) -> Operand:
    return x


@operator("Dropout", constants=("x", "ratio"), host=("training",))
def dropout(
    node: Node, x: Operand, ratio: Operand | None = None, training: np.ndarray | None = None
) -> tuple[Any, ...]:
    """The identity, as outside training, and with a ratio that drops nothing."""
    drops = not isinstance(ratio, Constant) or ratio.item() != 0
    if training is not None and bool(training.item()) and drops:
        raise Unsupported("training_mode")
    tensor = node.parameter(x) if isinstance(x, Constant) else x
    return (tensor, torch.ones_like(tensor, dtype=torch.bool)) if node.wants(1) else (tensor,)
