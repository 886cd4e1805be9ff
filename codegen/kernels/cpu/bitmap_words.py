"""How a word of a bitmap becomes vectors of weights, by what the instruction set offers."""

from __future__ import annotations

from typing import Protocol

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.simd import Expr, bind, intrinsic, load
from sparsify.layouts import Bitmap


class Words(Protocol):
    def spread(self, mask: Expr, values: Expr, position: Expr) -> list[Expr]:
        """A word's weights, ``word / width`` vectors by column, zero where no bit is set.

        ``position`` is that of the word's first value.
        """
        ...


def words_of(isa: Isa, layout: Bitmap, zero: Expr) -> Words:
    """Args:
    zero: an int32 that is zero at run time, which the compiler must not know.
    """
    if isa.name == "avx512" and layout.value_bits == 32:
        return ExpandedFloats(zero)
    if isa.name == "avx512" and isa.vbmi2:
        return ExpandedHalves(zero)
    return LookedUp(isa, layout)


def spread_cycles(isa: Isa, layout: Bitmap) -> float:
    """Cycles to spread 16 weights."""
    if isa.name == "avx512" and layout.value_bits == 32:
        return 2.25
    if isa.name == "avx512" and isa.vbmi2:
        return 1.35
    looked_up = 4.4 if layout.value_bits == 32 else 6.5
    return looked_up if isa.vector > 4 else 2.5 * looked_up


class ExpandedFloats:
    """AVX-512: one expansion by a mask register.

    Values go through a register first, by an exclusive-or with a zero that LLVM cannot see through:
    an expansion straight from memory is microcode on Zen.
    """

    def __init__(self, zero: Expr) -> None:
        self.zeros = bind(T.Broadcast(zero, 16))

    def spread(self, mask: Expr, values: Expr, position: Expr) -> list[Expr]:
        bits = T.reinterpret("int32x16", load(values, position, 16)) ^ self.zeros
        source = T.reinterpret("float32x16", bits)
        nothing = T.Broadcast(T.float32(0), 16)
        chosen = T.reinterpret("uint1x16", mask)
        name = "llvm.x86.avx512.mask.expand"
        return [bind(intrinsic("float32x16", name, source, nothing, chosen))]


class ExpandedHalves:
    """AVX-512 with VBMI2: 32 values of 16 bits at once, then a lane's lower and its upper half."""

    def __init__(self, zero: Expr) -> None:
        self.zeros = bind(T.Broadcast(zero, 16))

    def spread(self, mask: Expr, values: Expr, position: Expr) -> list[Expr]:
        bits = T.reinterpret("int32x16", load(values, position, 32)) ^ self.zeros
        source = T.reinterpret("int16x32", bits)
        nothing = T.Broadcast(T.int16(0), 32)
        chosen = T.reinterpret("uint1x32", mask)
        name = "llvm.x86.avx512.mask.expand"
        pairs = bind(intrinsic("int16x32", name, source, nothing, chosen))
        return _halves(T.reinterpret("int32x16", pairs), 16)


class LookedUp:
    """Everywhere: four bits look up a byte shuffle that puts up to four values in their places.

    With 16-bit values two shuffles fill the two halves of a 128-bit vector.
    """

    def __init__(self, isa: Isa, layout: Bitmap) -> None:
        self.isa, self.layout = isa, layout
        size = layout.value_bits // 8
        self.tables = (
            [_table(size, 4 * size * half) for half in range(4 // size)]
            if size == 2
            else [_table(size, 0)]
        )

    def spread(self, mask: Expr, values: Expr, position: Expr) -> list[Expr]:
        bits = bind(T.Cast("int64", mask))
        quads = [self._quad(bits, i, values, position) for i in range(self.layout.word // 4)]
        if self.layout.value_bits == 32:
            return self._joined([T.reinterpret("float32x4", quad) for quad in quads])
        octets = [
            T.reinterpret("int32x4", bind(a | b))
            for a, b in zip(quads[::2], quads[1::2], strict=True)
        ]
        halves = [_halves(octet, 4) for octet in octets]
        return [v for side in zip(*halves, strict=True) for v in self._joined(list(side))]

    def _quad(self, bits: Expr, index: int, values: Expr, position: Expr) -> Expr:
        """Four bits' values where they belong in 16 bytes, the rest zero."""
        before = T.bitwise_and(bits, T.int64((1 << 4 * index) - 1))
        at = bind(position + T.popcount(before)) if index else position
        source = T.reinterpret("int8x16", load(values, at, 128 // self.layout.value_bits))
        entry = T.bitwise_and(T.shift_right(bits, T.int64(4 * index)), T.int64(15))
        table = self.tables[index % len(self.tables)]
        shuffled = intrinsic("int8x16", self.isa.byte_shuffle, source, load(table, entry * 16, 16))
        return bind(shuffled)

    def _joined(self, quads: list[Expr]) -> list[Expr]:
        """Vectors of the full width from vectors of four."""
        width, each = self.isa.vector, self.isa.vector // 4
        groups = [quads[i : i + each] for i in range(0, len(quads), each)]
        return [
            bind(T.Shuffle(group, list(range(width)))) if each > 1 else bind(group[0])
            for group in groups
        ]


def _halves(pairs: Expr, width: int) -> list[Expr]:
    """The lower and the upper bfloat16 of each 32-bit lane, as fp32."""
    pairs = bind(pairs)
    lower = T.shift_left(pairs, T.Broadcast(T.int32(16), width))
    upper = T.bitwise_and(pairs, T.Broadcast(T.int32(-65536), width))
    return [bind(T.reinterpret(f"float32x{width}", half)) for half in (lower, upper)]


def _table(size: int, begin: int) -> Expr:
    """Byte shuffles for each of 16 masks: value ``i`` of ``size`` bytes to its set bit's place.

    Places start at byte ``begin``. On the stack, filled at each call: 16 stores.
    """
    table = T.alloc_buffer((256,), "int8", scope="global")
    for mask in range(16):
        control = [-128] * 16
        places = [place for place in range(4) if mask >> place & 1]
        for nth, place in enumerate(places):
            for byte in range(size):
                control[begin + place * size + byte] = nth * size + byte
        constant = T.Shuffle([T.int8(c) for c in control], list(range(16)))
        T.buffer_store(table, constant, [T.Ramp(T.int64(16 * mask), 1, 16)])
    return table
