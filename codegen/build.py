"""From specialised programs to a shared library."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from sparsify.codegen.compaction import compact_buffers, without_compaction
from sparsify.codegen.exact import keep_rounding
from sparsify.codegen.lower import lower
from sparsify.codegen.registry import Kernel
from sparsify.codegen.schedule import schedule_elementwise
from sparsify.codegen.target import Target
from sparsify.program import Program

_CHECKS = frozenset({"vm.builtin.check_tensor_info", "vm.builtin.match_shape"})


def compile_library(entries: Mapping[str, Program], target: Target, path: Path) -> None:
    """Compiles each program to an entry function of one shared library at ``path``.

    An entry takes the program's inputs, then its weights, in the order of the graph's inputs, and
    returns the outputs as a tuple. The file is complete or absent, never partial.

    Raises:
        LoweringError: naming the node that cannot be compiled.
        FileNotFoundError: no C compiler to link with.
    """
    if shutil.which(_linker()) is None:
        raise FileNotFoundError(
            f"linking kernels needs a C compiler, and {_linker()!r} is not on the PATH; "
            "install gcc or clang, or set CC"
        )
    executable = build(lower(entries, target), target)
    partial = path.with_suffix(f".{os.getpid()}.so")
    try:
        executable.export_library(str(partial), cc=_linker())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def build(module: tvm.IRModule, target: Target) -> relax.VMExecutable:
    """Compiles a Relax module for TVM's virtual machine."""
    tvm_target = target.tvm()
    pipeline = tvm.transform.Sequential(
        [
            *kernel_passes(target),
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            *relax.backend.cpu_generic.finalize_passes(tvm_target),
            drop_weight_checks,
        ]
    )
    with tvm_target, without_compaction():
        return relax.build(module, tvm_target, relax_pipeline=pipeline)


def build_kernels(kernels: Iterable[Kernel], target: Target) -> tvm.runtime.Executable:
    """Compiles kernels alone: functions by their names."""
    module = tvm.IRModule({kernel.name: kernel.build() for kernel in kernels})
    with without_compaction():
        return tvm.compile(module, target=target.tvm())


def kernel_passes(target: Target) -> tuple[Any, ...]:
    """Makes calls of kernels of a module's operators; what is not ours TVM legalises and fuses.

    This is TVM's CPU pipeline but for one thing: reshapes are never made into kernels, so that the
    pass which would turn such kernels back (and fails on kernels of our kind) is not needed.
    """
    return (
        relax.backend.DispatchSortScan(),
        relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        schedule_elementwise(target.isa.vector),
        keep_rounding,
        compact_buffers,
    )


@tvm.transform.module_pass(opt_level=0, name="drop_weight_checks")
def drop_weight_checks(module: tvm.IRModule, _: Any) -> tvm.IRModule:
    """Removes the shape checks of weights, which `Executor.bind` hands over as they were packed.

    They would cost more at every call than some kernels: two calls for each weight tensor.
    """
    kept = {}
    for name, function in module.functions_items():
        if isinstance(function, relax.Function) and "num_input" in function.attrs:
            weights = set(function.params[int(function.attrs["num_input"]) :])
            function = _without_checks(function, weights)
        kept[name] = function
    return tvm.IRModule(kept, attrs=module.attrs)


def _checks(value: Any, weights: set[Any]) -> bool:
    return (
        isinstance(value, relax.Call)
        and isinstance(value.op, relax.ExternFunc)
        and str(value.op.global_symbol) in _CHECKS
        and value.args[0] in weights
    )


def _without_checks(function: relax.Function, weights: set[Any]) -> relax.Function:
    blocks = [
        relax.BindingBlock([b for b in block.bindings if not _checks(b.value, weights)])
        for block in function.body.blocks
    ]
    body = relax.SeqExpr(blocks, function.body.body)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


def _linker() -> str:
    return os.environ.get("CC", "cc")
