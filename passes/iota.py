"""Reading mask code: integer ramps and constants, as mask builders spell them."""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass

import torch
from torch import fx

from sparsify.passes.graph import COPIES, Extent, arguments, aten, same, shape_of
from sparsify.rewriter import Rewriter

Scalar = int | float | bool

_CONSTANTS = {
    aten.full.default: "fill_value",
    aten.full_like.default: "fill_value",
    aten.new_full.default: "fill_value",
    aten.scalar_tensor.default: "s",
}
_FIXED = {
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
}
UNCHANGED = (
    *COPIES,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten._to_copy.default,
)
"""Operators whose result holds values of their operand, perhaps not all, and no others."""
AND = (aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Tensor)
OR = (aten.bitwise_or.Tensor, aten.logical_or.default, aten.__or__.Tensor)
NOT = (aten.bitwise_not.default, aten.logical_not.default)
FLIPPED = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt"}
COMPARISONS = {
    getattr(getattr(aten, name), overload): name
    for name in ("eq", "ne", "le", "lt", "ge", "gt")
    for overload in ("Tensor", "Scalar")
}


@dataclass(frozen=True)
class Iota:
    """A tensor that holds ``offset + index`` along one dim and is constant along all others."""

    dim: int
    """Counted from the end: -1 is the last."""
    offset: int
    length: Extent


def is_bool(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype == torch.bool)


def is_whole_slice(node: fx.Node) -> bool:
    """Whether a slice keeps everything."""
    options = arguments(node)
    start, end, step = options["start"], options["end"], options["step"]
    if start not in (None, 0) or step != 1:
        return False
    size = shape_of(node.args[0])[options["dim"]]
    return (
        end is None
        or (isinstance(end, int) and end == sys.maxsize)
        or same(size, shape_of(node)[options["dim"]])
    )


def iota(rewriter: Rewriter, node: object) -> Iota | None:
    """The ramp that a node holds, None when it is no ramp that can be read."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    weight = rewriter.weight_of(node)
    if weight is not None:
        return _stored_iota(weight)
    if node.op != "call_function":
        return None
    target = node.target
    if target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        options = arguments(node)
        start = options.get("start", 0)
        if node.meta["val"].is_floating_point() or not isinstance(start, int):
            return None
        return Iota(-1, start, shape_of(node)[0]) if options.get("step", 1) == 1 else None
    if target in (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar):
        return _shifted(rewriter, node)
    if target == aten.cat.default:
        return _joined(rewriter, node)
    if target not in UNCHANGED:
        return None
    ramp = iota(rewriter, node.args[0])
    return None if ramp is None else _moved(ramp, node)


def _stored_iota(weight: torch.Tensor) -> Iota | None:
    if weight.dtype != torch.int64 or weight.dim() == 0 or weight.numel() != weight.shape[-1]:
        return None
    row = weight.flatten()
    start = int(row[0]) if row.numel() else 0
    ramp = torch.arange(start, start + row.numel())
    return Iota(-1, start, row.numel()) if torch.equal(row, ramp) else None


def _shifted(rewriter: Rewriter, node: fx.Node) -> Iota | None:
    first, second = node.args[:2]
    if node.kwargs or isinstance(second, fx.Node) or not isinstance(second, int):
        return None
    ramp = iota(rewriter, first)
    if ramp is None:
        return None
    sign = 1 if node.target in (aten.add.Tensor, aten.add.Scalar) else -1
    return Iota(ramp.dim, ramp.offset + sign * second, ramp.length)


def _joined(rewriter: Rewriter, node: fx.Node) -> Iota | None:
    """Consecutive ramps side by side, as in ``cat([first - 1, positions])``."""
    rank = node.meta["val"].dim()
    dim = arguments(node)["dim"] % rank - rank
    first: Iota | None = None
    following: Extent = 0
    for part in node.args[0]:
        ramp = iota(rewriter, part)
        if ramp is None or ramp.dim != dim or part.meta["val"].dim() != rank:
            return None
        if first is None:
            first, following = ramp, ramp.offset
        if not same(following, ramp.offset):
            return None
        following = ramp.offset + ramp.length
    return None if first is None else Iota(dim, first.offset, shape_of(node)[dim])


def _moved(ramp: Iota, node: fx.Node) -> Iota | None:
    before, after = shape_of(node.args[0]), shape_of(node)
    target = node.target
    position = len(before) + ramp.dim
    if target == aten._to_copy.default:
        value = node.meta["val"]
        return ramp if not value.is_floating_point() and value.dtype != torch.bool else None
    if target == aten.unsqueeze.default:
        inserted = node.args[1] % len(after)
        position += inserted <= position
    elif target == aten.squeeze.dim:
        removed = node.args[1] % len(before)
        if removed == position:
            return None
        position -= removed < position
    elif target == aten.permute.default:
        position = [d % len(before) for d in node.args[1]].index(position)
    elif target == aten.slice.Tensor:
        return _sliced(ramp, node)
    elif target in (aten.view.default, aten.reshape.default):
        long = [d for d, size in enumerate(after) if not same(size, 1)]
        if len(long) != 1 or not same(after[long[0]], before[position]):
            return None
        position = long[0]
    elif target == aten.expand.default:
        return ramp if same(after[ramp.dim], before[ramp.dim]) else None
    return Iota(position - len(after), ramp.offset, ramp.length)


def _sliced(ramp: Iota, node: fx.Node) -> Iota | None:
    options = arguments(node)
    shape = shape_of(node)
    if options["dim"] % len(shape) - len(shape) != ramp.dim:
        return ramp
    start = options["start"] or 0
    if options["step"] != 1 or not isinstance(start, int) or start < 0:
        return None
    return Iota(ramp.dim, ramp.offset + start, shape[ramp.dim])


def constant(rewriter: Rewriter, node: object) -> Scalar | None:
    """The one value that all elements of a node have, None when there is none or unknown."""
    if isinstance(node, bool | int | float):
        return node
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    target = node.target
    if target in _CONSTANTS:
        value = arguments(node)[_CONSTANTS[target]]
        return _cast(value, node) if isinstance(value, bool | int | float) else None
    if target in _FIXED:
        return _cast(_FIXED[target], node)
    if target in UNCHANGED:
        value = constant(rewriter, node.args[0])
        return None if value is None else _cast(value, node)
    if target == aten.index.Tensor:
        return constant(rewriter, node.args[0])
    if target == aten.cumsum.default:
        return 0 if constant(rewriter, node.args[0]) in (0, False) else None
    if target == aten.sub.Tensor:
        return _difference(rewriter, node)
    if target == aten.mul.Tensor:
        factors = [constant(rewriter, factor) for factor in node.args[:2]]
        return None if None in factors else _cast(factors[0] * factors[1], node)  # type: ignore[operator]
    if target in COMPARISONS:
        return _compared(rewriter, node)
    if target in NOT and is_bool(node):
        value = constant(rewriter, node.args[0])
        return None if value is None else not value
    if target in AND + OR and is_bool(node):
        found = [constant(rewriter, a) for a in node.args[:2]]
        absorbing = target in OR
        if absorbing in [None if v is None else bool(v) for v in found]:
            return absorbing
        return None if None in found else not absorbing
    return None


def _cast(value: Scalar, node: fx.Node) -> Scalar:
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        return bool(value)
    return float(value) if dtype.is_floating_point else int(value)


def _difference(rewriter: Rewriter, node: fx.Node) -> int | None:
    """Two ramps along one dim differ by a constant."""
    left, right = (iota(rewriter, a) for a in node.args)
    if left is None or right is None or left.dim != right.dim or node.kwargs:
        return None
    if not same(left.length, right.length):
        return None
    return left.offset - right.offset


def _compared(rewriter: Rewriter, node: fx.Node) -> bool | None:
    """Two constants, or a ramp and a number that it never crosses, as in ``arange >= 0``."""
    name = COMPARISONS[node.target]
    left, right = node.args[:2]
    known = constant(rewriter, left), constant(rewriter, right)
    if known[0] is not None and known[1] is not None:
        return bool(getattr(operator, name)(*known))
    ramp, bound = iota(rewriter, left), constant(rewriter, right)
    if name in ("eq", "ne"):
        return None
    if ramp is None:
        ramp, bound, name = iota(rewriter, right), constant(rewriter, left), FLIPPED[name]
    if ramp is None or bound is None:
        return None
    lowest = ramp.offset
    if (name == "ge" and lowest >= bound) or (name == "gt" and lowest > bound):
        return True
    if (name == "lt" and lowest >= bound) or (name == "le" and lowest > bound):
        return False
    return None
