"""Vectors that lie side by side by one load, where a CPU has such an instruction: NEON's ld1.

LLVM makes one of its intrinsic alone, whose result has a type that TIR cannot name. So a kernel
brings a function in LLVM's language along, which TVM inlines wherever it is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.math import float_type
from sparsify.codegen.kernels.cpu.simd import Expr, LaneTile, bind, load

_NAME = "sparsify_load_neighbours"
_FOUR = "{ <4 x float>, <4 x float>, <4 x float>, <4 x float> }"


def _joined(name: str, half: str, count: int) -> str:
    """A line that joins %<name>0 and %<name>1, of a type, to a vector of so many lanes."""
    places = ", ".join(f"i32 {i}" for i in range(count))
    return f"%{name} = shufflevector {half} %{name}0, {half} %{name}1, <{count} x i32> <{places}>"


_NEON = f"""
declare {_FOUR} @llvm.aarch64.neon.ld1x4.v4f32.p0(ptr)

define <16 x float> @{_NAME}(ptr %at) {{
  %four = call {_FOUR} @llvm.aarch64.neon.ld1x4.v4f32.p0(ptr %at)
  %all00 = extractvalue {_FOUR} %four, 0
  %all01 = extractvalue {_FOUR} %four, 1
  %all10 = extractvalue {_FOUR} %four, 2
  %all11 = extractvalue {_FOUR} %four, 3
  {_joined("all0", "<4 x float>", 8)}
  {_joined("all1", "<4 x float>", 8)}
  {_joined("all", "<8 x float>", 16)}
  ret <16 x float> %all
}}
"""


@contextmanager
def neighbour_loads(isa: Isa) -> Iterator[None]:
    """What `load_run` and `load_tile` are called within."""
    if isa.vectors_per_load == 1:
        yield
        return
    with T.attr(T.int32(0), "pragma_import_llvm", _NEON):
        yield


def load_run(isa: Isa, buffer: Expr, at: Expr, count: int) -> list[Expr]:
    """Vectors that follow each other from an offset on; the buffer is of floats, or their bytes."""
    width, together = isa.vector, isa.vectors_per_load
    size = 4 if buffer.dtype == "uint8" else 1
    whole = count // together * together if together > 1 else 0
    vectors = []
    for first in range(0, whole, together):
        pointer = T.address_of(buffer[at + first * width * size])
        wide = bind(T.call_extern(float_type(together * width), _NAME, pointer))
        starts = range(0, together * width, width)
        vectors += [T.Shuffle([wide], list(range(start, start + width))) for start in starts]
    for v in range(whole, count):
        value = load(buffer, at + v * width * size, size * width)
        vectors.append(value if size == 1 else T.reinterpret(float_type(width), value))
    return vectors


def load_tile(isa: Isa, buffer: Expr, at: Expr, tile: LaneTile, features: Expr | int) -> list[Expr]:
    """The vectors of a tile from an offset on, a lane group after the other."""
    size = 4 if buffer.dtype == "uint8" else 1
    vectors = []
    for first in range(0, tile.vectors, isa.vectors_per_group):
        count = min(isa.vectors_per_group, tile.vectors - first)
        vectors += load_run(isa, buffer, at + tile.step(first, features) * size, count)
    return vectors
