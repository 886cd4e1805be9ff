"""C compilers for other machines, what runs their programs here, and a model to export."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsify
from tests.export.exported_net import LARGEST, Net, Product

WARNINGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pedantic")

NODE_RUNNER = """
import { WASI } from 'node:wasi';
import { readFile } from 'node:fs/promises';
const [file, ...rest] = process.argv.slice(2);
const wasi = new WASI({ version: 'preview1', args: [file, ...rest], preopens: { '.': '.' } });
const module = await WebAssembly.compile(await readFile(file));
process.exitCode = wasi.start(await WebAssembly.instantiate(module, wasi.getImportObject()));
"""


@dataclass(frozen=True)
class Toolchain:
    """Builds and runs programs for one kind of machine.

    Attributes:
        compilers: commands to try in turn.
        zig: the target's name for ``zig cc``, the last to try; empty for none.
        runner: what runs a program; empty for this machine itself.
        headers: a folder that must be there for the compilers, besides themselves.
    """

    compilers: tuple[tuple[str, ...], ...]
    zig: str = ""
    runner: tuple[str, ...] = ()
    flags: tuple[str, ...] = ("-static",)
    linked_weights: bool = True
    headers: str = "/"

    def missing(self) -> str | None:
        """Why programs for this machine cannot be built or run here."""
        if self._compiler() is None:
            names = ", ".join(command[0] for command in self.compilers)
            return f"no {names} and no ziglang: make edge-deps, or pip install ziglang"
        if self.runner and shutil.which(self.runner[0]) is None:
            return f"no {self.runner[0]}: make edge-deps"
        return None

    def _compiler(self) -> tuple[str, ...] | None:
        for command in self.compilers:
            if shutil.which(command[0]) and Path(self.headers).is_dir():
                return command
        if self.zig and importlib.util.find_spec("ziglang"):
            return (sys.executable, "-m", "ziglang", "cc", "-target", self.zig)
        return None

    def build(
        self,
        folder: Path,
        name: str = "model",
        *,
        sources: Sequence[str] = ("main.c",),
        launch: Sequence[str] = ("serial.c",),
        flags: Sequence[str] = (),
    ) -> Path:
        """A program of an exported folder; any warning is an error."""
        compiler = self._compiler()
        assert compiler is not None
        program = folder / "program"
        weights = [f"{name}_weights.S", f"-D{name.upper()}_LINKED_WEIGHTS"]
        command = [
            *compiler, *WARNINGS, *self.flags, *flags, "-I.",
            f"{name}.c", "sparsify.c", *launch, *sources, f"{name}_kernels.o",
            *(weights if self.linked_weights else ()), "-lm", "-o", str(program),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return program

    def run(
        self, program: Path, *arguments: object, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        runner = list(self.runner)
        if runner[:1] == ["node"]:
            script = program.with_name("run.mjs")
            script.write_text(NODE_RUNNER)
            runner += ["--no-warnings", script.name]
        command = [*runner, program.name if runner[:1] == ["node"] else str(program)]
        done = subprocess.run(
            [*command, *map(str, arguments)],
            cwd=program.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done


HOST = Toolchain((("cc",),), flags=())

TOOLCHAINS = {
    "raspberry-pi/4b": Toolchain(
        (("aarch64-linux-gnu-gcc",),),
        "aarch64-linux-musl",
        ("qemu-aarch64", "-cpu", "cortex-a72"),
    ),
    "armv7-neon": Toolchain(
        (("arm-linux-gnueabihf-gcc",),),
        "arm-linux-musleabihf",
        ("qemu-arm", "-cpu", "cortex-a7"),
    ),
    "riscv64": Toolchain(
        (("riscv64-linux-gnu-gcc",),), "riscv64-linux-musl", ("qemu-riscv64", "-cpu", "rv64")
    ),
    "riscv64-rvv": Toolchain(
        (("riscv64-linux-gnu-gcc",),),
        "riscv64-linux-musl",
        ("qemu-riscv64", "-cpu", "rv64,v=true,vlen=128,vext_spec=v1.0"),
    ),
    "wasm-simd": Toolchain(
        (("clang", "--target=wasm32-wasi"),),
        "wasm32-wasi",
        ("node",),
        ("-msimd128",),
        linked_weights=False,
        headers="/usr/include/wasm32-wasi",
    ),
}


@pytest.fixture(scope="session")
def host() -> Toolchain:
    return HOST


@pytest.fixture(scope="session")
def toolchain() -> Callable[[str], Toolchain]:
    """The one for a target; the test is skipped with the reason where it is not there."""

    def find(target: str) -> Toolchain:
        found = TOOLCHAINS[target]
        reason = found.missing()
        if reason:
            pytest.skip(reason)
        return found

    return find


@pytest.fixture(scope="session")
def net() -> nn.Module:
    torch.manual_seed(0)
    return sparsify.prune(Net().eval(), sparsify.Unstructured(0.8, skip=("qkv",)))


@pytest.fixture(scope="session")
def compiled(net: nn.Module) -> Any:
    return sparsify.compile(net, (torch.randn(2, 20, 48), torch.ones(2, 20)))


@pytest.fixture(scope="session")
def folder(compiled: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The net as C for x86."""
    path = tmp_path_factory.mktemp("c")
    compiled.export_c(path, target="x86-avx2", largest=LARGEST)
    return path


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A linear, and its C under its own name, with the sizes of its examples."""
    torch.manual_seed(0)
    module = Product().eval()
    folder = tmp_path_factory.mktemp("product")
    sparsify.compile(module, (torch.randn(2, 20, 48),)).export_c(
        folder, target="x86-avx2", name="product"
    )
    return module, folder
