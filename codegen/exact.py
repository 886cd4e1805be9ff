"""Keeps TVM's simplifier from taking floating-point numbers for real ones.

    (x[i] + 1e8) - 1e8    ->    opaque(opaque(x[i]) + opaque(1e8)) - opaque(1e8)    rounds
    x[i] == x[i]          ->    opaque(x[i]) == x[i]                                false for NaN

To the simplifier the first is x[i], the second is true, and ``x[i] * 0`` is 0; one over that ends
the process. It does not look through changes of type. LLVM, which keeps to IEEE 754, drops one that
is undone at once, so this costs nothing.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

_BINARY = (
    tirx.Add,
    tirx.Sub,
    tirx.Mul,
    tirx.Div,
    tirx.Mod,
    tirx.Min,
    tirx.Max,
    tirx.EQ,
    tirx.LT,
    tirx.LE,
    tirx.GT,
    tirx.GE,
)

_OTHER_TYPE = {
    "float16": "int16",
    "float32": "int32",
    "float64": "int64",
    "int8": "uint8",
    "uint8": "int8",
    "int16": "uint16",
    "uint16": "int16",
    "uint32": "int32",
    "uint64": "int64",
}
"""Types of as many bits; int32 and int64, which indices are of, stay transparent."""

_CONSTANTS = (tirx.FloatImm, tirx.IntImm)


@tvm.transform.module_pass(opt_level=0, name="keep_rounding")
def keep_rounding(module: tvm.IRModule, _: Any) -> tvm.IRModule:
    """Makes operands opaque in what Relax legalised; kernels of our own mean what they say."""
    kept = {}
    for name, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and has_blocks(function):
            body = tvm_ffi.structural_map(function.body, _REPLACEMENTS)
            function = function.with_body(body)
        kept[name] = function
    return tvm.IRModule(kept, attrs=module.attrs)


def has_blocks(function: tirx.PrimFunc) -> bool:
    """Whether Relax made a kernel: kernels of our own have no blocks."""
    body = function.body
    return isinstance(body, s_tir.SBlockRealize) and body.block.name_hint == "root"


def _opaque_operands(operation: Any) -> Any:
    """The first operand is enough where the second is no constant: nothing equals it any more."""
    if str(operation.a.ty.dtype) not in _OTHER_TYPE:
        return operation
    a, b = _opaque(operation.a), operation.b
    return type(operation)(a, _opaque(b) if isinstance(b, _CONSTANTS) else b)


def _unequal(operation: Any) -> Any:
    """NaN is unequal to all, itself included; TVM's code has it neither equal nor unequal."""
    if str(operation.a.ty.dtype) not in _OTHER_TYPE:
        return operation
    return _negated(_opaque_operands(tirx.EQ(operation.a, operation.b)))


def _negated(truth: Any) -> Any:
    """What is not less is not greater or equal, since NaN is neither."""
    return tirx.EQ(_opaque(truth.astype("int8")), tirx.const(0, "int8"))


def _opaque(value: Any) -> Any:
    if isinstance(value, tirx.IntImm) and value.value == 0:
        return value  # exact as it is, and TVM has it that a zero of another type is a pointer
    dtype = str(value.ty.dtype)
    return tirx.reinterpret(dtype, tirx.reinterpret(_OTHER_TYPE[dtype], value))


_REPLACEMENTS = (
    (_BINARY, _opaque_operands),
    (tirx.NE, _unequal),
    (tirx.Not, lambda operation: _negated(operation.a)),
)
