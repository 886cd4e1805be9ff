"""NEON against SVE on Neoverse V1, whose vectors have 256 bits: predicted cycles of sparse loops.

    make edge-deps
    python -m benchmarks.edge_vectors

The SELL kernel is compiled for both, with every tile that fits the registers; llvm-mca predicts how
many cycles a turn of each inner loop takes. Predictions are proxies and no times. Of the later
Arm cores, Neoverse V2 among them, SVE's vectors have NEON's 128 bits.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import tvm

from sparsify.bench.foreign import Emulated, Loop
from sparsify.codegen.compaction import without_compaction
from sparsify.codegen.isa import NEON, Isa
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.sell import SellLinear
from sparsify.codegen.target import Target
from sparsify.layouts import Sell

CPU = "neoverse-v1"
SVE = replace(NEON, name="sve256", vector=8, byte_shuffle=None, lane_factors=False)
ATTRIBUTES = {
    "neon": {},
    "sve256": {"mattr": ["+sve"], "cl-opt": ["-aarch64-sve-vector-bits-min:uint=256"]},
}
ROWS, VECTORS, STEPS, TOGETHER = (4, 8), (1, 2, 4), (1, 2), (1, 2, 4)


@dataclass(frozen=True)
class Predicted:
    """The inner loop of a kernel that makes the most products a cycle."""

    products: float
    kernel: str
    loop: Loop
    cycles: float


def loops(assembly: str) -> Iterator[Loop]:
    """Blocks that jump to their own beginning."""
    label, body = "", []
    for line in map(str.strip, assembly.splitlines()):
        if re.fullmatch(r"\.LBB\w+:.*", line):
            label, body = line.partition(":")[0], []
        elif line and not line.startswith((".", "//")) and not line.endswith(":"):
            body.append(re.sub(r"\s*//.*", "", line))
            if label and re.fullmatch(rf"(b\.\w+|cbn?z|tbn?z)\s.*{re.escape(label)}", body[-1]):
                yield Loop((*body[:-1], body[-1].replace(label, "0x0")), 1)


def predicted(isa: Isa, machine: Emulated) -> Iterator[Predicted]:
    for rows, vectors, steps, together in product(ROWS, VECTORS, STEPS, TOGETHER):
        made = replace(isa, steps_together=steps, vectors_per_load=together)
        if rows * vectors + vectors + 2 > isa.registers or together > vectors:
            continue
        kernel = SellLinear(made, 512, 384, Sell(rows, 384, 64), Epilogue(), vectors, 64 // rows)
        target = {**dict(Target.parse(CPU).spec), **ATTRIBUTES[isa.name]}
        with without_compaction():
            module = tvm.IRModule({kernel.name: kernel.build()})
            built = tvm.compile(module, target=tvm.target.Target(target)).mod
        for loop in loops(str(built.inspect_source("asm"))):
            count = sum(line.startswith("fmla") for line in loop.text)
            cycles = machine.cycles(loop) if count else None
            if cycles is not None:
                name = f"{rows} rows, {vectors * isa.vector} tokens"
                yield Predicted(count * isa.vector / cycles, name, loop, cycles)


def main() -> int:
    machine = Emulated.of("aarch64", CPU)
    print(f"predictions of llvm-mca for {CPU}, no times")
    for isa in (NEON, SVE):
        best = max(predicted(isa, machine), key=lambda found: found.products, default=None)
        if best is None:
            print("llvm-mca made no prediction: install LLVM's tools", file=sys.stderr)
            return 1
        print(
            f"{isa.name:7} {best.products:5.1f} products a cycle: {best.kernel}, "
            f"{len(best.loop.text)} instructions in {best.cycles:.1f} cycles"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
