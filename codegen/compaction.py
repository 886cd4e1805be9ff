"""Shrinks buffers to what is used of them at a time, in what Relax legalised alone.

    for i in n:                          for i in n:
        p = buffer(n)           ->           p = buffer(1)
        p[i] = x[i]; y[i] = p[i]             p[0] = x[i]; y[i] = p[0]

TVM's pass for it takes time in the square of a function's straight lines: up to nine tenths of the
compilation of a kernel of ours, which allocates what it uses and is left out.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

from sparsify.codegen.exact import has_blocks

COMPACTION = "s_tir.CompactBufferAllocation"

LEFT_OUT = (
    COMPACTION,
    # These look for what no code for a CPU has (virtual threads, permuted layouts and pipelines of
    # a GPU), and for conditions to hoist, which none of our loops has: they leave every kernel as
    # it is, and took a tenth of the time that a small language model takes in TVM.
    "s_tir.HoistIfThenElse",
    "s_tir.InjectPermutedLayout",
    "s_tir.InjectSoftwarePipeline",
    "s_tir.InjectVirtualThread",
    "s_tir.InsertHoistIfThenElse",
    "s_tir.ThreadSync",
)
"""Passes of TVM's pipeline that cost time at every kernel and change nothing."""

# What TVM's own pipeline has up to its compaction, of passes that a CPU needs.
_BLOCKS_UP_TO_COMPACTION = tvm.transform.Sequential(
    [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
    ]
)


@tvm.transform.module_pass(opt_level=0, name="compact_buffers")
def compact_buffers(module: tvm.IRModule, _: Any) -> tvm.IRModule:
    """Compacts the functions with blocks; follow it by a compilation `without_compaction`."""
    legalised = {
        name: function
        for name, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc) and has_blocks(function)
    }
    compacted = _BLOCKS_UP_TO_COMPACTION(tvm.IRModule(legalised))
    kept = dict(module.functions_items())
    kept.update((name, compacted[name.name_hint]) for name in legalised)
    return tvm.IRModule(kept, attrs=module.attrs)


def without_compaction() -> tvm.transform.PassContext:
    """The context in which to compile kernels of our own, and modules already compacted."""
    return tvm.transform.PassContext(disabled_pass=LEFT_OUT)
