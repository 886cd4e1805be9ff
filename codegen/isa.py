"""Instruction sets as kernels and the cost model see them; knows nothing of TVM."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparsify.layouts import LANES


@dataclass(frozen=True)
class Isa:
    """What kernels need to know about a CPU.

    Attributes:
        name: ``avx512``, ``avx2``, ``neon``, ``neon32`` (ARMv7), ``rvv``, ``rv64``, ``wasm``.
        vector: fp32 lanes of a vector register.
        registers: number of vector registers.
        fma_per_cycle, loads_per_cycle: whole vectors; AVX-512 on Zen 4 has 1 and 1, on Zen 5
            and server Intel 2 and 2.
        hertz: nominal clock, for predictions only.
        bytes_per_second: of memory, that weights which are no longer cached are read with; for
            predictions only.
        cache_bytes: of weights that stay in its last cache from call to call, about; for
            predictions only.
        permuted_of_four: of four neighbouring weights, how many come by one 128-bit load and are
            spread by in-lane permutes; the others are broadcast loads. Permutes spare the load
            ports, of which Zen 5 has two for whole vectors and scalars together; loads spare the
            shuffle ports, one of which Zen 4 and server Intel share with multiply-adds.
        vbmi2: AVX-512 that also expands and compresses 16-bit lanes.
        gathers: loads of lanes from scattered addresses, by AVX2's and AVX-512's instructions.
        byte_shuffle: LLVM's name of the instruction that picks bytes of 16 by indices and gives
            zero where an index has its top bit set; empty where there is none.
        lane_factors: multiply-adds take one lane of a vector as a factor, so four neighbouring
            scalars come by one load.
        nan_extremes: a vector's minimum and maximum are single instructions that keep NaN.
        overwrites_addend: a multiply-add's result takes the place of its addend.
        shifted_operands: an addition takes an operand shifted by any number of bits.
        vectors_per_load: vectors side by side that one instruction loads.
        steps_together: steps of a sparse kernel's inner loop in one run of it.
    """

    name: str
    vector: int
    registers: int
    fma_per_cycle: float = 2.0
    loads_per_cycle: float = 2.0
    hertz: float = 3.7e9
    bytes_per_second: float = 15e9
    cache_bytes: int = 1 << 20
    permuted_of_four: int = 0
    vbmi2: bool = False
    gathers: bool = False
    byte_shuffle: str = ""
    lane_factors: bool = False
    nan_extremes: bool = False
    overwrites_addend: bool = False
    shifted_operands: bool = False
    vectors_per_load: int = 1
    steps_together: int = 1

    @property
    def vectors_per_group(self) -> int:
        return LANES // self.vector


_PSHUFB = "llvm.x86.ssse3.pshuf.b.128"

AVX512 = Isa("avx512", 16, 32, cache_bytes=16 << 20, gathers=True, byte_shuffle=_PSHUFB)
"""Server Intel from Ice Lake on, and whatever is not known better."""

AVX512_ZEN5 = replace(AVX512, permuted_of_four=4)
AVX512_HALF_RATE = replace(
    AVX512, fma_per_cycle=1.0, loads_per_cycle=1.0, bytes_per_second=30e9, permuted_of_four=3
)
"""AVX-512 on 256-bit units: Zen 4."""

AVX2 = Isa("avx2", 8, 16, cache_bytes=8 << 20, gathers=True, byte_shuffle=_PSHUFB)

_TBL = "llvm.aarch64.neon.tbl1.v16i8"
NEON = Isa(
    "neon", 4, 32, loads_per_cycle=3.0, hertz=2.5e9, byte_shuffle=_TBL,
    lane_factors=True, nan_extremes=True, overwrites_addend=True, shifted_operands=True,
    vectors_per_load=4, steps_together=2,
)  # fmt: skip
NEON_A7X = replace(NEON, fma_per_cycle=2.0, loads_per_cycle=2.0, hertz=2.4e9)
"""Cortex-A76, A78 and Neoverse N1: two vectors loaded a cycle."""
NEON_A72 = replace(NEON, fma_per_cycle=2.0, loads_per_cycle=1.0, hertz=1.5e9)
NEON_A53 = replace(NEON, fma_per_cycle=1.0, loads_per_cycle=0.5, hertz=1.2e9, vectors_per_load=1)
"""In order; its loads are 64 bits wide, so that one of four vectors takes as long as two of two."""

NEON32 = Isa(
    "neon32", 4, 16, fma_per_cycle=0.5, loads_per_cycle=0.5, hertz=1.2e9,
    nan_extremes=True, overwrites_addend=True,
)  # fmt: skip
"""ARMv7's NEON."""

RVV = Isa("rvv", 4, 32, fma_per_cycle=1.0, loads_per_cycle=1.0, hertz=1.6e9)
"""RISC-V's vector extension with registers of 128 bits and more, of which 128 are used."""

RV64 = Isa("rv64", 4, 8, fma_per_cycle=0.25, loads_per_cycle=0.25, hertz=1.5e9)
"""RISC-V without vectors: four of the 32 floating-point registers stand for one."""

WASM = Isa(
    "wasm", 4, 16, fma_per_cycle=1.0, hertz=3e9, byte_shuffle="llvm.wasm.swizzle",
    nan_extremes=True,
)  # fmt: skip
"""WebAssembly's 128-bit vectors, on the 16 registers that engines have on x86."""
