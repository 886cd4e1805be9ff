"""Schedules what Relax legalises and fuses itself: elementwise loops, parallel and in vectors.

for i, j in grid(m, 384): t[i, j] = f(x[i, j])
for i, j in grid(m, 384): y[i, j] = g(t[i, j])
  -> for i in parallel(m): for j in serial(24): for v in vectorized(16): y[...] = g(f(x[...]))
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

from sparsify.codegen.exact import has_blocks

_SERIAL_BELOW = 4096
"""Elements below which starting threads costs more than it saves."""


def schedule_elementwise(vector: int) -> Any:
    """A module pass; kernels of our own have no blocks and are left alone.

    Args:
        vector: fp32 lanes of the target's vectors.
    """

    @tvm.transform.module_pass(opt_level=0, name="schedule_elementwise")
    def run(module: tvm.IRModule, _: Any) -> tvm.IRModule:
        scheduled = {}
        for name, function in module.functions_items():
            if isinstance(function, tirx.PrimFunc) and has_blocks(function):
                function = _scheduled(function, vector)
            scheduled[name] = function
        return tvm.IRModule(scheduled, attrs=module.attrs)

    return run


def _scheduled(function: tirx.PrimFunc, vector: int) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(function)
    root = schedule.get_sblock("root")
    for block in schedule.get_child_blocks(root):
        if not _elementwise(schedule, block):
            _start_apart(schedule, block)
            continue
        try:
            schedule.compute_inline(block)
        except s_tir.ScheduleError:
            # The output itself, or a value that a reduction reads.
            _vectorize_and_parallelize(schedule, block, vector)
    return schedule.mod["main"].with_attrs(function.attrs)


def _elementwise(schedule: Any, block: Any) -> bool:
    kinds = {variable.iter_type for variable in schedule.get(block).iter_vars}
    return kinds == {tirx.IterVar.DataPar}


def _start_apart(schedule: Any, block: Any) -> None:
    """Sets a reduction's result to its start before the loop, which may run over nothing."""
    if schedule.get(block).init is None:
        return
    variables, loops = schedule.get(block).iter_vars, schedule.get_loops(block)
    reduced = [
        loop
        for variable, loop in zip(variables, loops, strict=True)
        if variable.iter_type == tirx.IterVar.CommReduce
    ]
    if not all(isinstance(schedule.get(loop).extent, tirx.IntImm) for loop in reduced):
        schedule.decompose_reduction(block, reduced[0])


def _vectorize_and_parallelize(schedule: Any, block: Any, vector: int) -> None:
    loops = schedule.get_loops(block)
    if not loops:
        return
    extents = [schedule.get(loop).extent for loop in loops]
    inner = extents[-1]
    if isinstance(inner, tirx.IntImm) and inner.value % vector == 0 and inner.value > 0:
        last, lanes = schedule.split(loops[-1], [None, vector])
        schedule.vectorize(lanes)
        loops[-1] = last
    known = [extent.value for extent in extents if isinstance(extent, tirx.IntImm)]
    total = 1
    for extent in known:
        total *= extent
    if len(known) < len(extents) or total >= _SERIAL_BELOW:
        outer = loops[:-1] or loops
        schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])
