"""What is left by a division, and its quotient rounded down, of floating-point numbers.

TVM takes ``x - floor(x / y) * y``, which loses all digits where the quotient is large (1e20 % 3 is
-2.5e11) and is no number where y is infinite. LLVM's frem, as the C library's fmod, is exact.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from torch import fx
from tvm import relax, tirx

from sparsify.codegen.operators.arguments import arguments_of
from sparsify.codegen.operators.pointwise import of_two

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def convert_remainder(node: fx.Node, lowering: Lowering) -> Any:
    """What is left has the sign of the divisor."""
    if not node.meta["val"].is_floating_point():
        return lowering._binary_op(relax.op.floor_mod, operator.mod)(node)
    return of_two(lowering, node.args[0], node.args[1], _remainder, "remainder")


def convert_floor_divide(node: fx.Node, lowering: Lowering) -> Any:
    """``div`` with a rounding mode, and ``floor_divide``."""
    mode = arguments_of(node).get("rounding_mode", "floor")
    if mode != "floor" or not node.meta["val"].is_floating_point():
        if node.target._schema.name == "aten::div":
            return lowering._div(node)
        return lowering._binary_op(relax.op.floor_divide, operator.floordiv)(node)
    return of_two(lowering, node.args[0], node.args[1], _floored, "floor_divide")


def _remainder(x: Any, y: Any) -> Any:
    left = tirx.Mod(x, y)
    return tirx.Select(_of_other_sign(left, y), left + y, left)


def _floored(x: Any, y: Any) -> Any:
    """The quotient of what y divides exactly, as PyTorch has it."""
    zero, one = tirx.const(0, x.ty.dtype), tirx.const(1, x.ty.dtype)
    left = tirx.Mod(x, y)
    quotient = (x - left) / y - tirx.Select(_of_other_sign(left, y), one, zero)
    floor = tirx.floor(quotient)
    whole = floor + tirx.Select(quotient - floor > 0.5, one, zero)
    return tirx.Select(y == zero, x / y, whole)


def _of_other_sign(left: Any, y: Any) -> Any:
    """Whether something is left, and on the other side of zero than the divisor."""
    return tirx.any(tirx.all(left > 0, y < 0), tirx.all(left < 0, y > 0))
