"""From specialised programs to a shared library."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import tvm
from tvm import relax

from sparsify.codegen.lower import lower
from sparsify.codegen.schedule import schedule_elementwise
from sparsify.codegen.target import Target
from sparsify.program import Program


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
    """Compiles a Relax module; what is not ours is legalised and fused by TVM.

    This is TVM's CPU pipeline but for one thing: reshapes are never made into kernels, so that the
    pass which would turn such kernels back (and fails on kernels of our kind) is not needed.
    """
    tvm_target = target.tvm()
    keep_views = relax.transform.LegalizeOps(skip_ops=["relax.reshape"])
    pipeline = tvm.transform.Sequential(
        [
            relax.backend.DispatchSortScan(),
            keep_views,
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            schedule_elementwise(target.isa.vector),
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            *relax.backend.cpu_generic.finalize_passes(tvm_target),
        ]
    )
    with tvm_target:
        return relax.build(module, tvm_target, relax_pipeline=pipeline)


def _linker() -> str:
    return os.environ.get("CC", "cc")
