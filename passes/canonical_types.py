"""Rules of `Canonicalize` about dtypes: every promotion that PyTorch does is written out.

TVM's importer takes the dtype of the first operand, or refuses mixed operands.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from sparsify.passes.graph import arguments, aten, is_tensor
from sparsify.rewriter import Rewriter


def _overloads(names: str, kinds: str) -> set[Any]:
    found = set()
    for name in names.split():
        packet = getattr(aten, name)
        found |= {getattr(packet, kind) for kind in kinds.split() if kind in packet.overloads()}
    return found


_ARITHMETIC = _overloads(
    "add sub mul div rsub remainder fmod maximum minimum pow atan2 floor_divide clamp clamp_min "
    "clamp_max lerp addcmul addcdiv",
    "default Tensor Scalar Tensor_mode Scalar_mode Tensor_Tensor Tensor_Scalar",
)
_COMPARISON = _overloads("eq ne lt le gt ge", "Tensor Scalar")
_FLOATING = _overloads(
    "exp log log2 log10 log1p expm1 sqrt rsqrt sin cos tan tanh sigmoid erf reciprocal "
    "atan asin acos sinh cosh",
    "default",
)
_ACCUMULATING = {
    aten.cumsum.default,
    aten.cumprod.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.prod.default,
    aten.softmax.int,
    aten.log_softmax.int,
}
_TRUTH = {aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim}


def cast(rewriter: Rewriter, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """``x`` in another dtype, or itself."""
    if x.meta["val"].dtype == dtype:
        return x
    return rewriter.call(aten._to_copy.default, (x,), {"dtype": dtype})


def elementwise_promotion(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Casts operands of an elementwise operator to the dtype it computes in."""
    dtype = _computed_in(node)
    if dtype is None:
        return None
    first = 1 if node.target == aten.where.self else 0
    changed = False
    args, target = list(node.args), node.target
    for position in range(first, len(args)):
        operand = args[position]
        if is_tensor(operand) and operand.meta["val"].dtype != dtype:
            args[position] = cast(rewriter, operand, dtype)
            changed = True
        elif dtype.is_floating_point and _is_size(operand):
            args[position] = _counted(rewriter, operand, dtype)
            changed = True
            if target._overloadname == "Scalar":
                target = target.overloadpacket.Tensor
        elif type(operand) is int and dtype.is_floating_point and node.target in _COMPARISON:
            args[position] = float(operand)
            changed = True
    return rewriter.call(target, tuple(args), dict(node.kwargs)) if changed else None


def _is_size(operand: Any) -> bool:
    return isinstance(operand, fx.Node) and isinstance(operand.meta.get("val"), torch.SymInt)


def _counted(rewriter: Rewriter, size: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A size as a tensor without dims: TVM has no cast from an extent to a float."""
    ones = rewriter.call(aten.full.default, ([size], 1.0), {"dtype": dtype})
    return rewriter.call(aten.sum.default, (ones,))


def _computed_in(node: fx.Node) -> torch.dtype | None:
    result = node.meta.get("val")
    if not isinstance(result, torch.Tensor):
        return None
    if node.target in _ARITHMETIC or node.target in _FLOATING or node.target == aten.where.self:
        return result.dtype
    if node.target in _COMPARISON:
        operands = [a.meta["val"] if is_tensor(a) else a for a in node.args[:2]]
        operands = [1 if _is_size(a) else a for a in operands]
        if any(isinstance(a, fx.Node) for a in operands):
            return None
        promoted = torch.result_type(*operands)
        return torch.int64 if promoted == torch.bool and not _both_bool(operands) else promoted
    return None


def _both_bool(operands: list[Any]) -> bool:
    return all(isinstance(a, torch.Tensor | bool) for a in operands)


def cast_before_reduction(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``cumsum(bool)`` adds in int64, ``softmax(int, dtype=float)`` computes in float."""
    if node.target not in _ACCUMULATING:
        return None
    source, result = node.args[0], node.meta["val"].dtype
    options = arguments(node)
    if source.meta["val"].dtype == result and options.get("dtype") is None:
        return None
    position = [a.name for a in node.target._schema.arguments].index("dtype")
    args = tuple(a for i, a in enumerate(node.args[1:], 1) if i != position)
    kwargs = {key: value for key, value in node.kwargs.items() if key != "dtype"}
    return rewriter.call(node.target, (cast(rewriter, source, result), *args), kwargs)


def boolean_reduction(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``any`` and ``all`` of numbers compare them with zero first."""
    if node.target not in _TRUTH or node.args[0].meta["val"].dtype == torch.bool:
        return None
    zero: Any = 0.0 if node.args[0].meta["val"].is_floating_point() else 0
    truth = rewriter.call(aten.ne.Scalar, (node.args[0], zero))
    return rewriter.call(node.target, (truth, *node.args[1:]), dict(node.kwargs))


def typed_scalar_division(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """The importer makes a Python divisor int32; a tensor keeps the dividend's dtype."""
    if node.target not in (aten.div.Tensor_mode, aten.floor_divide.default):
        return None
    divisor, result = node.args[1], node.meta["val"].dtype
    if type(divisor) not in (int, float) or result == torch.float32:
        return None
    scalar = rewriter.call(aten.full.default, ([], divisor), {"dtype": result})
    return rewriter.call(node.target, (node.args[0], scalar), dict(node.kwargs))


def typed_zero(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``x * 0`` and ``x / 0``: TVM makes 0 of the first for all x, and an error of the second."""
    if node.target not in _PRODUCTS or not node.meta["val"].is_floating_point():
        return None
    x, zero = node.args
    if isinstance(zero, fx.Node) or zero != 0:
        return None
    zero = rewriter.call(aten.full.default, ([], zero), {"dtype": node.meta["val"].dtype})
    return rewriter.call(getattr(aten, node.target.overloadpacket.__name__).Tensor, (x, zero))


_PRODUCTS = _overloads("mul div", "Tensor Scalar")
_SCALED = _overloads("add sub rsub", "Tensor Scalar")


def explicit_alpha(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``add(x, y, alpha=2)``: the importer leaves ``alpha`` out, without a word."""
    if node.target not in _SCALED:
        return None
    options = arguments(node)
    alpha = options.get("alpha", 1)
    if alpha == 1:
        return None
    x, other = node.args[:2]
    if node.target in (aten.rsub.Tensor, aten.rsub.Scalar):
        x = rewriter.call(aten.mul.Tensor, (x, alpha))
    elif isinstance(other, fx.Node):
        other = rewriter.call(aten.mul.Tensor, (other, alpha))
    else:
        other = other * alpha
    return rewriter.call(node.target, (x, other))


def explicit_elu_scales(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``elu(x, alpha, scale, input_scale)``: the importer leaves the scales out."""
    if node.target != aten.elu.default:
        return None
    options = arguments(node)
    alpha, scale, inner = (options[k] for k in ("alpha", "scale", "input_scale"))
    if scale == 1 and inner == 1:
        return None
    x = options["self"]
    negative = rewriter.call(aten.expm1.default, (rewriter.call(aten.mul.Tensor, (x, inner)),))
    negative = rewriter.call(aten.mul.Tensor, (negative, alpha * scale))
    positive = rewriter.call(aten.mul.Tensor, (x, scale))
    above = rewriter.call(aten.gt.Scalar, (x, 0.0))
    return rewriter.call(aten.where.self, (above, positive, negative))


def boolean_arithmetic(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Products and sums of bools are ``and`` and ``or``; TVM multiplies i1 as a float."""
    logical = {aten.mul.Tensor: aten.logical_and.default, aten.add.Tensor: aten.logical_or.default}
    if node.target not in logical or node.meta["val"].dtype != torch.bool:
        return None
    if not all(is_tensor(a) for a in node.args):
        return None
    return rewriter.call(logical[node.target], node.args)


def boolean_comparison(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``b == True`` is b, ``b == False`` is not b; TVM compares i1 as a float."""
    if node.target not in (aten.eq.Scalar, aten.ne.Scalar):
        return None
    x, other = node.args
    if x.meta["val"].dtype != torch.bool or other not in (0, 1) or isinstance(other, float):
        return None
    if (node.target == aten.eq.Scalar) == bool(other):
        return rewriter.call(aten.clone.default, (x,))
    return rewriter.call(aten.logical_not.default, (x,))


def finite_fill(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``full(-inf)``, which TVM fails to print as a constant, is ``full(1) * -inf``."""
    if node.target not in (aten.full.default, aten.full_like.default):
        return None
    value = node.args[1]
    if not isinstance(value, float) or math.isfinite(value):
        return None
    ones = rewriter.call(node.target, (node.args[0], 1.0), dict(node.kwargs))
    return rewriter.call(aten.mul.Tensor, (ones, value))


def bounded_integer_clamp(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """An integer clamp without one of its bounds: the importer puts infinity there."""
    if node.target not in (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default):
        return None
    dtype = node.meta["val"].dtype
    options = arguments(node)
    low, high = options.get("min"), options.get("max")
    if dtype.is_floating_point or dtype == torch.bool or (low is not None and high is not None):
        return None
    limits = torch.iinfo(dtype)
    low, high = limits.min if low is None else low, limits.max if high is None else high
    return rewriter.call(aten.clamp.default, (options["self"], low, high))
