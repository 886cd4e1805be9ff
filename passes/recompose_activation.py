"""Activations that are spelled out as products."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from sparsify.passes.graph import arguments, aten, is_tensor, past_copies
from sparsify.rewriter import Rewriter

_SUMS = (aten.add.Tensor, aten.add.Scalar)
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
_QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)


def activation(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``gelu``, ``silu`` or ``hardswish`` of a tensor that a product spells out."""
    if node.target not in (*_PRODUCTS, *_QUOTIENTS):
        return None
    scale, tensors = factors(node)
    if len(tensors) != 2 or not all(map(is_tensor, tensors)):
        return None
    for x, gate in (tensors, tensors[::-1]):
        if _close(scale, 1) and gate.target == aten.sigmoid.default and _reads(gate, x):
            return rewriter.call(aten.silu.default, (x,))
        if _close(scale, 1) and gate.target == aten.hardsigmoid.default and _reads(gate, x):
            return rewriter.call(aten.hardswish.default, (x,))
        if _close(scale, 1 / 6) and _is_hard_gate(gate, x):
            return rewriter.call(aten.hardswish.default, (x,))
        if _close(scale, 0.5) and _is_error_gate(gate, x):
            return rewriter.call(aten.gelu.default, (x,))
    return None


def factors(node: fx.Node) -> tuple[float, list[fx.Node]]:
    """The number and the nodes whose product a node is, through products that it alone reads.

    Numbers that are known only at run time are among the nodes.
    """
    scale, found = 1.0, []
    pending: list[Any] = [node]
    while pending:
        value = past_copies(pending.pop())
        if isinstance(value, int | float):
            scale *= value
        elif value.target in _PRODUCTS and (value is node or len(value.users) == 1):
            pending += [value.args[1], value.args[0]]
        elif value.target in _QUOTIENTS and isinstance(value.args[1], int | float):
            if value is not node and len(value.users) != 1:
                found.append(value)
                continue
            scale /= value.args[1]
            pending.append(value.args[0])
        else:
            found.append(value)
    return scale, found


def plus(node: fx.Node) -> tuple[fx.Node, float] | None:
    """``x + number``, in either order."""
    if node.target not in _SUMS or arguments(node).get("alpha", 1) != 1:
        return None
    for x, number in (node.args[:2], node.args[1::-1]):
        if isinstance(x, fx.Node) and isinstance(number, int | float):
            return past_copies(x), float(number)
    return None


def _is_error_gate(gate: fx.Node, x: fx.Node) -> bool:
    """``1 + erf(x / sqrt(2))``"""
    shifted = plus(gate)
    if shifted is None or shifted[1] != 1 or shifted[0].target != aten.erf.default:
        return False
    scale, tensors = factors(past_copies(shifted[0].args[0]))
    return tensors == [x] and _close(scale, math.sqrt(0.5))


def _is_hard_gate(gate: fx.Node, x: fx.Node) -> bool:
    """``clamp(x + 3, 0, 6)``"""
    if gate.target not in (aten.clamp.default, aten.hardtanh.default):
        return False
    low, high = list(arguments(gate).values())[1:3]
    shifted = plus(past_copies(gate.args[0]))
    return (low, high) == (0, 6) and shifted is not None and shifted == (x, 3.0)


def _reads(gate: fx.Node, x: fx.Node) -> bool:
    return past_copies(gate.args[0]) is x


def _close(found: float, wanted: float) -> bool:
    """Whether a number of a file, rounded to float32, is this one."""
    return math.isclose(found, wanted, rel_tol=1e-5)
