"""Object files: their symbols, what is refused, and that LLVM cannot end this process."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from tvm.tirx.script.builder import ir as T

from sparsify.codegen.emit import objects
from sparsify.codegen.emit.objects import LAUNCH, RAISE, ObjectError, compile_object
from sparsify.codegen.emit.symbols import Symbols
from sparsify.codegen.kernels.cpu.simd import (
    Tensor,
    arguments,
    intrinsic,
    load,
    prim_func,
    splat,
    store,
    symbol,
)
from sparsify.codegen.target import Target


def exponential(name: str) -> Any:
    with prim_func(name) as result:
        n = symbol()
        x, y = arguments(Tensor("x", (n,)), Tensor("y", (n,)))
        with T.parallel(n) as i:
            store(y, i, T.erf(load(x, i, 1)), 1)
    return result[0]


@pytest.mark.parametrize("name", ["x86-avx2", "arm64-neon", "armv7-neon", "riscv64", "wasm-simd"])
def test_symbols(name: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.o"
    made = compile_object({"first": exponential("first"), "second": exponential("second")},
                          Target.parse(name), path)  # fmt: skip
    assert made.entries == {"first": "__tvm_ffi_first", "second": "__tvm_ffi_second"}
    assert set(made.entries.values()) <= made.symbols.defined
    assert LAUNCH in made.symbols.defined
    arm = {"__aeabi_unwind_cpp_pr0", "__divdi3"} if name == "armv7-neon" else set()
    assert made.symbols.undefined == {RAISE, "erff"} | arm
    assert list(tmp_path.iterdir()) == [path]


def test_the_linker_sees_the_same_symbols(tmp_path: Path) -> None:
    path = tmp_path / "kernels.o"
    made = compile_object({"f": exponential("f")}, Target.parse("x86-avx2"), path)
    listed = subprocess.run(
        ["nm", "--extern-only", path], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split()[-2:] for line in listed.splitlines()]
    assert made.symbols.undefined == {name for kind, name in lines if kind == "U"}
    assert made.symbols.defined == {name for kind, name in lines if kind != "U"}


def test_an_instruction_that_the_cpu_lacks_is_an_error(tmp_path: Path) -> None:
    """LLVM aborts its process for it."""
    with prim_func("dot") as dot:
        a, b = (Tensor(name, (16,), "int8") for name in "ab")
        a, b, y = arguments(a, b, Tensor("y", (4,), "int32"))
        zeros = splat(T.int32(0), 4)
        sdot = "llvm.aarch64.neon.sdot"
        store(y, 0, intrinsic("int32x4", sdot, zeros, load(a, 0, 16), load(b, 0, 16)), 4)
    with pytest.raises(ObjectError, match=r"'arm64-neon': LLVM was ended by SIGABRT.* select"):
        compile_object({"dot": dot[0]}, Target.parse("arm64-neon"), tmp_path / "dot.o")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "the compiler was killed, .* memory .*: nothing"),
        ("raise TypeError('no such code')", "could not be compiled. It said: TypeError: no such"),
    ],
)
def test_a_compiler_that_ends_otherwise(
    worker: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text(worker)
    monkeypatch.setattr(objects, "_WORKER", tmp_path / "worker.py")
    with prim_func("copy") as copy:
        x, y = arguments(Tensor("x", (4,)), Tensor("y", (4,)))
        store(y, 0, load(x, 0, 4), 4)
    with pytest.raises(ObjectError, match=message):
        compile_object({"copy": copy[0]}, Target.parse("x86-avx2"), tmp_path / "copy.o")
    assert [path.name for path in tmp_path.iterdir()] == ["worker.py"]


def test_a_call_of_a_library_is_refused(tmp_path: Path) -> None:
    with prim_func("sort") as sort:
        x, y = arguments(Tensor("x", (4,)), Tensor("y", (1,)))
        store(y, 0, T.call_extern("float32", "tvm_contrib_sort", x.data), 1)
    with pytest.raises(ObjectError, match="calls tvm_contrib_sort, which no C library has"):
        compile_object({"sort": sort[0]}, Target.parse("x86-avx2"), tmp_path / "sort.o")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.o"
    path.write_text("no object")
    with pytest.raises(ValueError, match="neither a little-endian ELF file nor a WebAssembly"):
        Symbols.of(path)
