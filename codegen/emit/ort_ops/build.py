"""Builds the library: kernels by TVM, everything else by the system's C compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from sparsify.codegen.emit.objects import compile_object
from sparsify.codegen.emit.ort_ops.kernels import Table, declarations, kernel_table
from sparsify.codegen.emit.ort_ops.operators import operator_rows
from sparsify.codegen.target import Target

SOURCES = Path(__file__).parent
_FLAGS = (
    *("-std=gnu11", "-O2", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Werror", "-Wl,--no-undefined", "-s"),
)
_CPUID = ("avx2", "fma", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi2")
"""Features that library.c asks the CPU for."""


def build(path: Path, target: Target) -> None:
    """Writes the library for a target to ``path``, which is complete or absent.

    Raises:
        FileNotFoundError: no folder to write into, or no C compiler.
        RuntimeError: it failed; with what it said.
        ObjectError: LLVM refuses a kernel.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.absolute().parent}: no such folder to write into")
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler) is None:
        raise FileNotFoundError(
            f"building the library needs a C compiler, and {compiler!r} is not on the PATH; "
            "install gcc or clang, or set CC"
        )
    table = kernel_table(target.isa)
    partial = path.with_suffix(f".{os.getpid()}.so")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        functions = {n: kernel.build() for n, kernel in table.kernels.items()}
        made = compile_object(functions, target, folder / "kernels.o")
        (folder / "table.c").write_text(c_table(table, target))
        sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
        command = [compiler, *_FLAGS, f"-I{SOURCES}", "-o", str(partial), *sources]
        exports = folder / "exports"
        exports.write_text("{ global: RegisterCustomOps; local: *; };\n")
        command += [str(folder / "table.c"), str(made.path), "-lm"]
        command += [f"-Wl,--version-script={exports}"]
        try:
            _run(command)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def c_table(table: Table, target: Target) -> str:
    """The generated source: kernels, operators, and what the CPU must have."""
    features = [f'"{feature}", ' for feature in target.features if feature in _CPUID]
    rows = ",\n    ".join(operator_rows())
    lines = [
        "/* Generated: the kernels and operators of the library. */",
        '#include "library.h"',
        *declarations(table),
        *table.definitions,
        f"Operator operators[] = {{\n    {rows}}};",
        "const size_t operator_count = sizeof operators / sizeof *operators;",
        f'const char target_name[] = "{target.name}";',
        f"const char *const required_features[] = {{{''.join(features)}NULL}};",
    ]
    return "\n".join(lines) + "\n"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"the library could not be linked: {command[0]} ended with {done.returncode}:\n"
            f"{done.stderr.strip()}"
        )
