"""The larger and the smaller of numbers, as PyTorch has them: NaN is both.

TVM compares and drops NaN: its ``max(NaN, 0)`` is 0. Where one of the two is a constant, the order
of operands settles it at no cost: ``c > x ? c : x`` is x where the comparison fails.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from tvm import relax, tirx

from sparsify.codegen.operators.arguments import arguments_of
from sparsify.codegen.operators.pointwise import each, of_two

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def larger(a: Any, b: Any) -> Any:
    """The larger of two expressions, NaN if either is."""
    if not is_float(a):
        return tirx.max(a, b)
    return tirx.Select(tirx.any(a > b, tirx.isnan(a)), a, b)


def smaller(a: Any, b: Any) -> Any:
    """The smaller of two expressions, NaN if either is."""
    if not is_float(a):
        return tirx.min(a, b)
    return tirx.Select(tirx.any(a < b, tirx.isnan(a)), a, b)


def at_least(x: Any, bound: float) -> Any:
    """The larger of an expression and a number."""
    least = tirx.const(bound, x.ty.dtype)
    return tirx.Select(least > x, least, x)


def at_most(x: Any, bound: float) -> Any:
    """The smaller of an expression and a number."""
    most = tirx.const(bound, x.ty.dtype)
    return tirx.Select(most < x, most, x)


def is_float(x: Any) -> bool:
    return "float" in str(x.ty.dtype)


def convert_maximum(node: fx.Node, lowering: Lowering) -> Any:
    if not node.meta["val"].is_floating_point():
        return lowering._binary_op(relax.op.maximum, torch.maximum)(node)
    return of_two(lowering, node.args[0], node.args[1], larger, "maximum")


def convert_minimum(node: fx.Node, lowering: Lowering) -> Any:
    if not node.meta["val"].is_floating_point():
        return lowering._binary_op(relax.op.minimum, torch.minimum)(node)
    return of_two(lowering, node.args[0], node.args[1], smaller, "minimum")


def convert_clamp(node: fx.Node, lowering: Lowering) -> Any:
    """``clamp`` and its kin; a bound is a number, a tensor, or none."""
    if not node.meta["val"].is_floating_point():
        return lowering._clamp(node)
    a = arguments_of(node)
    x, low, high = lowering.tensor(a["self"]), a.get("min"), a.get("max")
    for bound, by_number, by_tensor in ((low, at_least, larger), (high, at_most, smaller)):
        if isinstance(bound, fx.Node):
            x = of_two(lowering, x, bound, by_tensor, "clamp")
        elif bound is not None:
            x = each(lowering, x, partial(by_number, bound=bound), "clamp")
    return x


def convert_relu(node: fx.Node, lowering: Lowering) -> Any:
    return each(lowering, lowering.tensor(node.args[0]), lambda x: at_least(x, 0), "relu")


def convert_hardtanh(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    x, low, high = lowering.tensor(a["self"]), a["min_val"], a["max_val"]
    return each(lowering, x, lambda e: at_most(at_least(e, low), high), "hardtanh")


def convert_hardsigmoid(node: fx.Node, lowering: Lowering) -> Any:
    return each(lowering, lowering.tensor(node.args[0]), _hardsigmoid, "hardsigmoid")


def convert_hardswish(node: fx.Node, lowering: Lowering) -> Any:
    x = lowering.tensor(node.args[0])
    return each(lowering, x, lambda e: e * _hardsigmoid(e), "hardswish")


def convert_elu(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    alpha, scale, inner = (float(a[name]) for name in ("alpha", "scale", "input_scale"))

    def elu(x: Any) -> Any:
        return tirx.Select(x > 0, x * scale, (tirx.exp(x * inner) - 1) * (alpha * scale))

    return each(lowering, lowering.tensor(a["self"]), elu, "elu")


def convert_softshrink(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    width = float(a["lambd"])

    def shrunk(x: Any) -> Any:
        inside = tirx.all(x <= width, x >= -width)
        return tirx.Select(
            inside, tirx.const(0, x.ty.dtype), tirx.Select(x > 0, x - width, x + width)
        )

    return each(lowering, lowering.tensor(a["self"]), shrunk, "softshrink")


def _hardsigmoid(x: Any) -> Any:
    return at_most(at_least(x + 3.0, 0), 6) / 6.0
