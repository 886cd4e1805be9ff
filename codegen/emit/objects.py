"""TIR functions to one relocatable object file that any linker takes, without TVM's runtime.

    made = compile_object({"scale": function}, Target.parse("arm64-neon"), Path("kernels.o"))
    made.entries  # {"scale": "__tvm_ffi_scale"}

An entry has TVM's calling convention, ``int32_t f(void *, TVMFFIAny *args, int32_t count,
TVMFFIAny *result)``, tensors as ``{type_index = 7, DLTensor *}``. It returns 0, or -1 after it has
told `RAISE` why. The file needs the C libraries and `RAISE`, a function that the program provides,
and nothing else. `SLOTS` are pointers to functions that the file defines weakly, as null: a program
with parallel loops or workspaces defines them in their place.

LLVM ends its process when it cannot select an instruction, so it runs in one of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tvm
from tvm import tirx

from sparsify.codegen.compaction import LEFT_OUT
from sparsify.codegen.emit.symbols import Symbols
from sparsify.codegen.target import Target

RAISE = "TVMFFIErrorSetRaisedFromCStrParts"
"""``void (const char *kind, const char **parts, int32_t count)``: the parts make the message."""

LAUNCH = "__TVMBackendParallelLaunch"
SLOTS = (LAUNCH, "__TVMBackendAllocWorkspace", "__TVMBackendFreeWorkspace")
"""Pointers to functions of tvm/runtime/c_backend_api.h's types."""

_LIBM = frozenset(
    name + suffix
    for name in (
        *("acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "copysign"),
        *("cos", "cosh", "erf", "exp", "exp10", "exp2", "expm1", "fabs", "floor", "fma", "fmax"),
        *("fmin", "fmod", "hypot", "ldexp", "log", "log10", "log1p", "log2", "nearbyint", "pow"),
        *("rint", "round", "roundeven", "sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
    )
    for suffix in ("", "f")
)
_LIBC = frozenset({"memcpy", "memmove", "memset"})
_COMPILER = ("__aeabi_", "__div", "__udiv", "__mod", "__umod", "__mul", "__ash", "__lshr", "__fix",
             "__float", "__extend", "__trunc")  # fmt: skip
"""Arithmetic that a CPU lacks, 64-bit division on 32-bit ARM for one: in every C compiler's own
library."""

_WORKER = Path(__file__).with_name("object_worker.py")


class ObjectError(RuntimeError):
    """TIR could not be compiled to an object file for a target; says why."""


@dataclass(frozen=True)
class ObjectFile:
    """An object file on disk.

    Attributes:
        entries: each function's symbol.
        symbols: what it defines, and what a program that links it must.
    """

    path: Path
    entries: Mapping[str, str]
    symbols: Symbols


def entry_symbol(name: str) -> str:
    """The symbol of a function's entry."""
    return f"__tvm_ffi_{name}"


def compile_object(
    functions: Mapping[str, tirx.PrimFunc], target: Target, path: Path
) -> ObjectFile:
    """Compiles functions to an object file at ``path``, which is complete or absent.

    Names become symbols, so files that are linked together need different ones.

    Raises:
        UnknownTarget: LLVM does not know the target's CPU.
        ObjectError: LLVM refuses the code, or it needs a symbol that no C library has.
    """
    target.tvm()
    module = tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in functions.items()})
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        _run_worker(tvm.ir.save_json(module), target, partial)
        entries = {name: entry_symbol(name) for name in functions}
        made = ObjectFile(path, entries, Symbols.of(partial))
        _check(made, target)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return made


def _run_worker(module: str, target: Target, path: Path) -> None:
    # -P: the worker's own folder is no place to import from.
    spec = json.dumps(dict(target.spec))
    command = [sys.executable, "-P", str(_WORKER), spec, str(path), *LEFT_OUT]
    done = subprocess.run(command, input=module, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = done.stderr.strip().splitlines() or [""]
    said = next((line for line in lines if line.startswith("LLVM ERROR")), lines[-1])
    if done.returncode == -signal.SIGKILL:
        why = "the compiler was killed, as it is where memory runs out; it may need some GB"
    elif done.returncode < 0:
        ended = signal.Signals(-done.returncode).name
        why = f"LLVM was ended by {ended}; a kernel may use an instruction that the CPU lacks"
    else:
        why = "the code could not be compiled"
    raise ObjectError(f"target {target.name!r}: {why}. It said: {said or 'nothing'}")


def _check(made: ObjectFile, target: Target) -> None:
    missing = sorted(set(made.entries.values()) - made.symbols.defined)
    if missing:
        raise ObjectError(f"target {target.name!r}: the object lacks {', '.join(missing)}")
    known = _LIBM | _LIBC | {RAISE} | set(SLOTS)
    foreign = sorted(
        s for s in made.symbols.undefined if s not in known and not s.startswith(_COMPILER)
    )
    if foreign:
        raise ObjectError(
            f"target {target.name!r}: the code calls {', '.join(foreign)}, which no C library has; "
            "an operator needs TVM's runtime and cannot run without it"
        )
