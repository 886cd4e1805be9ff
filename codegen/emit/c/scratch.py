"""How much memory kernels ask for while they run, besides their stack."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.ir import Range
from tvm.s_tir import SBlock
from tvm.sym import Analyzer
from tvm.tirx import AllocBuffer, Bind
from tvm.tirx.analysis import undefined_vars
from tvm_ffi.structural import structural_walk

from sparsify.codegen.emit.c.arena import Bounds, aligned
from sparsify.codegen.emit.c.straight import Call, ExportError, StraightCode, View

_ON_STACK = 64
"""Bytes of a global buffer that is surely a register or on the stack, if its size is known.

One vector. TVM puts larger ones there too, but not all; those count here, as if it did not. Buffers
that are local to a task (scope ``local``) it never does, however small.
"""


def scratch_bytes(module: tvm.IRModule, code: StraightCode, bounds: Bounds) -> int:
    """Bytes that the neediest call asks for at most on one thread."""
    return max((_bytes_of(module, call, bounds) for call in code.calls if call.kernel), default=0)


def _bytes_of(module: tvm.IRModule, call: Call, bounds: Bounds) -> int:
    function = module[call.kernel]
    buffers, names = _buffers(function.body)
    if not buffers:
        return 0
    analyzer = _bound_symbols(function, call, bounds)
    for buffer in buffers:
        for extent in buffer.shape:
            _define(analyzer, extent, names)
    total = 0
    for buffer in buffers:
        size = -(-buffer.dtype.bits * buffer.dtype.lanes // 8)
        for extent in buffer.shape:
            size *= int(analyzer.const_int_bound(extent).max_value)
        known = all(isinstance(extent, tirx.IntImm) for extent in buffer.shape)
        if not known or buffer.scope() != "global" or size > _ON_STACK:
            total += aligned(size)
    if total >= 1 << 40:
        raise ExportError(f"kernel {call.kernel}: a buffer of its own has no known largest size")
    return total


def _buffers(body: Any) -> tuple[list[Any], dict[Any, Any]]:
    """The buffers of a kernel, and the values that it gives names to."""
    found: list[Any] = []
    names: dict[Any, Any] = {}

    def allocation(statement: Any) -> None:
        found.append(statement.buffer)

    def block(statement: Any) -> None:
        found.extend(statement.alloc_buffers)

    def name(statement: Any) -> None:
        names[statement.var] = statement.value

    structural_walk(body, [(AllocBuffer, allocation), (SBlock, block), (Bind, name)])
    return found, names


def _define(analyzer: Analyzer, value: Any, names: dict[Any, Any]) -> None:
    """Tells the analyser what the names in a value stand for, each once."""
    for symbol in undefined_vars(value):
        if symbol in names:
            meant = names.pop(symbol)
            _define(analyzer, meant, names)
            analyzer.bind(symbol, meant)


def _bound_symbols(function: Any, call: Call, bounds: Bounds) -> Analyzer:
    """What the call's tensors and sizes say about the kernel's own symbols."""
    analyzer, known = Analyzer(), set()
    for parameter, operand in zip(function.params, call.operands, strict=True):
        if isinstance(operand, View):
            pairs = zip(parameter.shape, bounds.shape(operand), strict=True)
        else:
            pairs = zip((parameter,), (bounds.largest(operand),), strict=True)
        for symbol, most in pairs:
            if isinstance(symbol, tvm.ir.Var) and symbol not in known:
                known.add(symbol)
                analyzer.bind(symbol, Range(0, most + 1))
    return analyzer
