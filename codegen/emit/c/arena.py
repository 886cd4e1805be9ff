"""Where tensors lie in one block of memory: those that live at different times share bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.ir import Range
from tvm.sym import Analyzer

from sparsify.codegen.emit.c.straight import ExportError, Extent, StraightCode, View

ALIGNMENT = 64
"""Bytes; kernels load whole vectors from where tensors begin."""

_ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2,
               "int16": 2, "int8": 1, "uint8": 1, "bool": 1}  # fmt: skip


class Bounds:
    """The least and largest values of sizes.

    Args:
        ranges: those of each of the entry's symbols, by name.
    """

    def __init__(self, code: StraightCode, ranges: Mapping[str, tuple[int, int]]) -> None:
        self._analyzer = Analyzer()
        for name, symbol in code.symbols().items():
            least, most = ranges[name]
            self._analyzer.bind(symbol, Range(least, most + 1))

    def largest(self, extent: Extent) -> int:
        return int(self._analyzer.const_int_bound(extent).max_value)

    def least(self, extent: Extent) -> int:
        return max(0, int(self._analyzer.const_int_bound(extent).min_value))

    def shape(self, view: View) -> tuple[int, ...]:
        return tuple(map(self.largest, view.shape))

    def nbytes(self, view: View) -> int:
        total = item_bytes(view.dtype)
        for extent in self.shape(view):
            total *= extent
        return total


@dataclass(frozen=True)
class Arena:
    """Offsets by the index of each storage in the arena, and the arena's size, in bytes."""

    offsets: Mapping[int, int]
    nbytes: int


def plan(code: StraightCode, bounds: Bounds) -> Arena:
    """Places the largest tensors first, each at the lowest offset that is free while it lives.

    A tensor lives from the call that makes it to the last that reads it.
    """
    lives: dict[int, tuple[int, int]] = {}
    sizes: dict[int, int] = {}
    for time, call in enumerate(code.calls):
        for view in call.operands:
            if isinstance(view, View) and view.storage.where == "arena":
                index = view.storage.index
                lives[index] = (lives.get(index, (time, time))[0], time)
                sizes[index] = max(sizes.get(index, 0), aligned(bounds.nbytes(view)))
    offsets: dict[int, int] = {}
    for index in sorted(sizes, key=lambda i: (-sizes[i], lives[i])):
        born, dead = lives[index]
        beside = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if lives[other][0] <= dead and born <= lives[other][1]
        )
        at = 0
        for begin, end in beside:
            if at + sizes[index] <= begin:
                break
            at = max(at, end)
        offsets[index] = at
    return Arena(offsets, max((offsets[i] + sizes[i] for i in offsets), default=0))


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def item_bytes(dtype: str) -> int:
    """Bytes of one element.

    Raises:
        ExportError: a type that tensors of exported C cannot have.
    """
    if dtype not in _ITEM_BYTES:
        raise ExportError(
            f"a tensor of {dtype}, a type that exported C does not have; cast it in the model to "
            f"one of {', '.join(_ITEM_BYTES)}"
        )
    return _ITEM_BYTES[dtype]
