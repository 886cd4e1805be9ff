"""Fair timing against peers; used by ``sparsify benchmark`` and by ``benchmarks/``.

Nothing here imports the compiler: whatever can be called can be timed.
"""

from sparsify.bench.harness import (
    Ratio,
    Samples,
    fastest,
    interleave,
    ratio,
    relative_error,
)
from sparsify.bench.machine import Machine, threads
from sparsify.bench.matmuls import MATMUL_PEERS, matmul_peers
from sparsify.bench.models import MODEL_PEERS, OnnxModel, compiled_peer, model_peers
from sparsify.bench.peer import Peer, flat_tensors, float64_reference, split_inputs
from sparsify.bench.prefill import CompiledPrefill, PrefillStep

__all__ = [
    "MATMUL_PEERS",
    "MODEL_PEERS",
    "CompiledPrefill",
    "Machine",
    "OnnxModel",
    "Peer",
    "PrefillStep",
    "Ratio",
    "Samples",
    "compiled_peer",
    "fastest",
    "flat_tensors",
    "float64_reference",
    "interleave",
    "matmul_peers",
    "model_peers",
    "ratio",
    "relative_error",
    "split_inputs",
    "threads",
]
