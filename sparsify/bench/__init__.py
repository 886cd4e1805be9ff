"""Fair timing against peers; used by ``sparsify benchmark`` and by ``benchmarks/``.

Nothing here imports the compiler: whatever can be called can be timed.
"""

from sparsify.bench.harness import Ratio, Samples, fastest, interleave, ratio, relative_error
from sparsify.bench.machine import Machine, threads

__all__ = [
    "Machine",
    "Ratio",
    "Samples",
    "fastest",
    "interleave",
    "ratio",
    "relative_error",
    "threads",
]
