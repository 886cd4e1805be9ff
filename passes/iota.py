"""Reading mask code: integer ramps, constants and triangles, as mask builders spell them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import fx

from sparsify.passes.graph import Extent, arguments, aten, same, shape_of
from sparsify.program import Rewriter

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
_UNCHANGED = (
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten._to_copy.default,
)
AND = (aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Tensor)
OR = (aten.bitwise_or.Tensor, aten.logical_or.default, aten.__or__.Tensor)
NOT = (aten.bitwise_not.default, aten.logical_not.default)
_FLIPPED = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt"}
_COMPARISONS = {
    getattr(getattr(aten, name), overload): name
    for name in ("le", "lt", "ge", "gt")
    for overload in ("Tensor", "Scalar")
}
_LARGEST_TRIANGLE = 1 << 26
"""Elements of a stored mask that are still compared with a triangle."""


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
    if target not in _UNCHANGED:
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
    if target in _UNCHANGED:
        value = constant(rewriter, node.args[0])
        return None if value is None else _cast(value, node)
    if target in _COMPARISONS:
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


def _compared(rewriter: Rewriter, node: fx.Node) -> bool | None:
    """``arange >= 0`` and the like: a ramp against a number that it never crosses."""
    name = _COMPARISONS[node.target]
    left, right = node.args[:2]
    ramp, bound = iota(rewriter, left), constant(rewriter, right)
    if ramp is None:
        ramp, bound, name = iota(rewriter, right), constant(rewriter, left), _FLIPPED[name]
    if ramp is None or bound is None:
        return None
    lowest = ramp.offset
    if (name == "ge" and lowest >= bound) or (name == "gt" and lowest > bound):
        return True
    if (name == "lt" and lowest >= bound) or (name == "le" and lowest > bound):
        return False
    return None


def diagonal(rewriter: Rewriter, node: object) -> int | None:
    """d if a bool mask is ``key - query <= d`` over its last two dims, None when it is not."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if not is_bool(node) or node.meta["val"].dim() < 2:
        return None
    weight = rewriter.weight_of(node)
    if weight is not None:
        return 0 if _is_triangle(weight) else None
    if node.op != "call_function":
        return None
    if node.target == aten.tril.default and constant(rewriter, node.args[0]) is True:
        return arguments(node)["diagonal"]
    if node.target in _COMPARISONS:
        return _diagonal_of(rewriter, _COMPARISONS[node.target], *node.args[:2])
    if node.target in NOT and node.args[0].target in _COMPARISONS:
        opposite = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le"}
        inner = node.args[0]
        return _diagonal_of(rewriter, opposite[_COMPARISONS[inner.target]], *inner.args[:2])
    if node.target == aten.slice.Tensor:
        start_is_first = arguments(node)["start"] in (None, 0) and arguments(node)["step"] == 1
        return diagonal(rewriter, node.args[0]) if start_is_first else None
    same_plane = (*_UNCHANGED[:5], aten.unsqueeze.default, aten.view.default)
    if node.target not in same_plane or node.args[0].meta["val"].dim() < 2:
        return None
    before, after = shape_of(node.args[0]), shape_of(node)
    if not all(same(a, b) for a, b in zip(before[-2:], after[-2:], strict=True)):
        return None
    return diagonal(rewriter, node.args[0])


def _diagonal_of(rewriter: Rewriter, name: str, left: object, right: object) -> int | None:
    key, query = iota(rewriter, left), iota(rewriter, right)
    if key is None or query is None:
        return None
    if key.dim == -2:
        key, query, name = query, key, _FLIPPED[name]
    if (key.dim, query.dim) != (-1, -2) or name not in ("le", "lt"):
        return None
    return query.offset - key.offset - (name == "lt")


def _is_triangle(weight: torch.Tensor) -> bool:
    if (
        weight.numel() > _LARGEST_TRIANGLE
        or weight.numel() != weight[..., :, :].shape[-1] * weight.shape[-2]
    ):
        return False
    return torch.equal(weight, torch.ones_like(weight).tril())
