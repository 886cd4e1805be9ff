"""Instruction sets as kernels and the cost model see them; knows nothing of TVM."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.layouts import LANES


@dataclass(frozen=True)
class Isa:
    """What kernels need to know about a CPU.

    Attributes:
        name: ``avx512``, ``avx2``, ``neon``.
        vector: fp32 lanes of a vector register.
        registers: number of vector registers.
        fma_per_cycle, loads_per_cycle: whole vectors; AVX-512 on Zen 4 has 1 and 1, on Zen 5
            and server Intel 2 and 2.
        hertz: nominal clock, for predictions only.
        permuted_of_four: of four neighbouring weights, how many come by one 128-bit load and are
            spread by in-lane permutes; the others are broadcast loads. Permutes spare the load
            ports, of which Zen 5 has two for whole vectors and scalars together; loads spare the
            shuffle ports, one of which Zen 4 and server Intel share with multiply-adds.
        vbmi2: AVX-512 that also expands and compresses 16-bit lanes.
    """

    name: str
    vector: int
    registers: int
    fma_per_cycle: float = 2.0
    loads_per_cycle: float = 2.0
    hertz: float = 3.7e9
    permuted_of_four: int = 0
    vbmi2: bool = False

    @property
    def vectors_per_group(self) -> int:
        return LANES // self.vector


AVX512 = Isa("avx512", 16, 32)
"""Server Intel from Ice Lake on, and whatever is not known better."""

AVX512_ZEN5 = Isa("avx512", 16, 32, permuted_of_four=4)
AVX512_HALF_RATE = Isa("avx512", 16, 32, fma_per_cycle=1.0, loads_per_cycle=1.0, permuted_of_four=3)
"""AVX-512 on 256-bit units: Zen 4."""

AVX2 = Isa("avx2", 8, 16)
NEON = Isa("neon", 4, 32, loads_per_cycle=3.0, hertz=2.5e9)
