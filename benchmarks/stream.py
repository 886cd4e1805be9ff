"""A plain streaming read: the bandwidth that memory gives at this moment, to one thread or more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.simd import (
    Registers,
    Tensor,
    arguments,
    bind,
    load,
    prefetch,
    prim_func,
    store,
    symbol,
)

_PART = 4096
"""Floats of one run; parts are spread over threads as kernels spread their rows."""

_AHEAD = 1024
_LINE = 16


@dataclass(frozen=True)
class Stream:
    """Adds up ``x[floats]`` in vectors; ``y[parts, 64]`` receives a sum of each 4096 floats."""

    isa: Isa

    @property
    def name(self) -> str:
        return f"stream_{self.isa.name}"

    def build(self) -> Any:
        width = self.isa.vector
        step = 4 * width
        with prim_func(self.name) as result:
            parts = symbol()
            x, y = arguments(Tensor("x", (parts, _PART)), Tensor("y", (parts, 64)))
            with T.parallel(parts) as part:
                total = Registers(4, width)
                total.clear()
                begin = bind(part * _PART)
                with T.serial(T.int64(_PART // step)) as i:
                    at = bind(begin + i * step)
                    for line in range(0, step, _LINE):
                        prefetch(x, at + _AHEAD + line)
                    for v in range(4):
                        total[v] = total[v] + load(x, at + v * width, width)
                for v in range(4):
                    store(y, part * 64 + v * width, total[v], width)
        return result[0]

    @staticmethod
    def parts(nbytes: int) -> int:
        """How many parts are about so many bytes."""
        return max(1, nbytes // (4 * _PART))

    @staticmethod
    def shapes(parts: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (parts, _PART), (parts, 64)
