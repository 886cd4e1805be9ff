"""Functions of one tensor, or of two that broadcast, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm import relax, te, tirx

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def each(lowering: Lowering, x: Any, function: Callable[[Any], Any], name: str) -> Any:
    """A function of each element, given as an expression."""

    def compute(x: te.Tensor) -> te.Tensor:
        return te.compute(x.shape, lambda *i: function(x(*i)), name)

    return lowering.block_builder.emit_te(compute, x, primfunc_name_hint=name)


def of_two(
    lowering: Lowering, a: Any, b: Any, function: Callable[[Any, Any], Any], name: str
) -> Any:
    """A function of two operands that broadcast; the second may be a number."""
    a, b = lowering.tensor(a), lowering.tensor(b)
    if not isinstance(b, relax.Expr):
        number = b
        return each(lowering, a, lambda e: function(e, tirx.const(number, e.ty.dtype)), name)

    def compute(a: te.Tensor, b: te.Tensor) -> te.Tensor:
        dims = max(len(a.shape), len(b.shape))
        pairs = zip(_padded(a.shape, dims), _padded(b.shape, dims), strict=True)
        shape = [other if _is_one(size) else size for size, other in pairs]
        return te.compute(shape, lambda *i: function(_at(a, i), _at(b, i)), name)

    return lowering.block_builder.emit_te(compute, a, b, primfunc_name_hint=name)


def _padded(shape: Any, dims: int) -> list[Any]:
    return [tirx.IntImm("int64", 1)] * (dims - len(shape)) + list(shape)


def _at(x: te.Tensor, indices: Any) -> Any:
    """The element of a tensor that broadcasts over these indices."""
    own = indices[len(indices) - len(x.shape) :]
    zero = tirx.IntImm("int64", 0)
    return x(*(zero if _is_one(s) else i for i, s in zip(own, x.shape, strict=True)))


def _is_one(size: Any) -> bool:
    return isinstance(size, tirx.IntImm) and int(size) == 1
