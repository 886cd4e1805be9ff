"""Arithmetic on unsigned integers of 16 to 64 bits, which PyTorch stores but does not calculate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch

from sparsify.frontend.onnx.registry import Unsupported
from sparsify.frontend.onnx.values import Constant, untraced

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_ORDERED = frozenset(["Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Max", "Min"])
_HIGHEST = torch.iinfo(torch.int64).min


def signed(run: Callable[..., Any], wraps_around: Iterable[str] = ()) -> Callable[..., Any]:
    """A handler that calculates in int64 when it is given unsigned operands.

    Args:
        run: takes the node and operands of one type, and gives a result of that type or bool.
        wraps_around: operators whose 64 bits are right although int64 takes them for negative.
    """
    safe = frozenset(wraps_around)

    @wraps(run)
    def handle(node: Any, *operands: Any) -> Any:
        dtype = next((d for d in map(_dtype, operands) if d in _UNSIGNED), None)
        if dtype is None:
            return run(node, *operands)
        ordered = dtype == torch.uint64 and node.operator in _ORDERED
        if dtype == torch.uint64 and node.operator not in safe and not ordered:
            raise Unsupported("uint64, for which PyTorch has no such operator")
        # With the highest bit turned, int64 has the order of uint64.
        turn = _HIGHEST if ordered else 0
        result = run(node, *(_widened(operand, turn) for operand in operands))
        if result.dtype != torch.int64:
            return result
        return (result ^ turn if turn else result).to(dtype)

    return handle


def _dtype(operand: Any) -> torch.dtype | None:
    return getattr(operand.tensor if isinstance(operand, Constant) else operand, "dtype", None)


def _widened(operand: Any, turn: int) -> Any:
    if _dtype(operand) not in _UNSIGNED:
        return operand
    if isinstance(operand, Constant):
        with untraced():
            return Constant(_widened(operand.tensor, turn), operand.name)
    wide = operand.to(torch.int64)
    return wide ^ turn if turn else wide
