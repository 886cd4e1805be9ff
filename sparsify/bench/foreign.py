"""Exported C on a machine that is not this one: counted in an emulator, or timed on a device.

Counts of instructions, and LLVM's predictions of inner loops' cycles, are proxies for speed: they
say what a program asks of a CPU, not how long the CPU takes. Only a device tells times.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_SOURCES = ("-I.", "model.c", "sparsify.c", "serial.c", "model_kernels.o")
_CLASSES = ("fma", "vector", "loads", "stores")
_MCA_ROUNDS = 100
_QEMU_CPUS = {cpu: cpu for cpu in ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1")}
"""Those that QEMU 7 knows; for another it has all features of its architecture."""


class ForeignError(RuntimeError):
    """A program could not be built or run for another machine; says what to do."""


@dataclass(frozen=True)
class Emulated:
    """A C compiler's prefix, by its Debian name, and an emulator with its CPU."""

    machine: str
    prefix: str
    emulator: tuple[str, ...]
    cpu: str

    @classmethod
    def of(cls, machine: str, cpu: str) -> Emulated:
        """For an architecture, as `platform.machine` calls it, and a CPU by LLVM's name.

        Raises:
            ForeignError: instructions of that architecture cannot be counted, or tools are missing.
        """
        known = {
            "aarch64": ("aarch64-linux-gnu", ("qemu-aarch64", "-cpu", _QEMU_CPUS.get(cpu, "max"))),
            "armv7l": ("arm-linux-gnueabihf", ("qemu-arm", "-cpu", cpu)),
            "riscv64": ("riscv64-linux-gnu", ("qemu-riscv64", "-cpu", "rv64,v=true,vlen=128")),
        }
        if machine not in known:
            raise ForeignError(f"instructions are counted on {', '.join(known)}, not on {machine}")
        prefix, emulator = known[machine]
        for tool in (f"{prefix}-gcc", emulator[0]):
            if shutil.which(tool) is None:
                raise ForeignError(f"no {tool} on the PATH: make edge-deps")
        return cls(machine, prefix, (*emulator, "-L", f"/usr/{prefix}"), cpu)

    def build(self, folder: Path) -> Path:
        """The program of an exported folder, without weights in it."""
        compiler = f"{self.prefix}-gcc"
        _run([compiler, "-O2", "-static", *_SOURCES, "main.c", "-lm", "-o", "program"], folder)
        return folder / "program"

    def count(
        self,
        program: Path,
        arguments: Sequence[str],
        *,
        stdin: str = "/dev/null",
        stdout: str = "/dev/null",
    ) -> Counts:
        """Instructions of one run, of a program that takes ``--repeat``: two runs less one."""
        folder = program.parent
        with tempfile.TemporaryDirectory(prefix="sparsify-") as made:
            plugin = str(Path(made) / "icount.so")
            _run(["cc", "-O2", "-shared", "-fPIC", str(_HERE / "icount.c"), "-o", plugin], folder)
            said = []
            for repeat in ("1", "2"):
                command = [*self.emulator, "-plugin", plugin, f"./{program.name}", *arguments]
                with open(folder / stdin, "rb") as given, open(folder / stdout, "wb") as written:
                    done = _run([*command, "--repeat", repeat], folder, given, written)
                said.append(json.loads(done.splitlines()[-1]))
            once, twice = said
        before = {loop["address"]: loop["runs"] for loop in once["loops"]}
        loops = [
            Loop(tuple(loop["text"]), loop["runs"] - before.get(loop["address"], 0))
            for loop in twice["loops"]
        ]
        classes = {name: twice[name] - once[name] for name in ("all", *_CLASSES)}
        return Counts(classes, tuple(loop for loop in loops if loop.runs > 0))

    def cycles(self, loop: Loop) -> float | None:
        """Cycles of one turn of a loop as llvm-mca predicts them, where it is there and can."""
        tool = _llvm_mca()
        if tool is None:
            return None
        *body, branch = loop.text
        code = "\n".join([".Lloop:", *body, re.sub(r"#?0x[0-9a-f]+$", ".Lloop", branch), ""])
        triple = {"armv7l": "armv7-linux-gnueabihf"}.get(self.machine, f"{self.machine}-linux-gnu")
        command = [tool, f"-mtriple={triple}", f"-mcpu={self.cpu}", f"-iterations={_MCA_ROUNDS}"]
        done = subprocess.run(command, input=code, capture_output=True, text=True, check=False)
        found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
        return int(found[1]) / _MCA_ROUNDS if done.returncode == 0 and found else None


@dataclass(frozen=True)
class Loop:
    """An inner loop's instructions, and how often it turns in one run."""

    text: tuple[str, ...]
    runs: int


@dataclass(frozen=True)
class Counts:
    """Instructions of one run by class, and the inner loops that most of them are in."""

    classes: dict[str, int]
    loops: tuple[Loop, ...]

    @property
    def other(self) -> int:
        return self.classes["all"] - sum(self.classes[name] for name in _CLASSES)

    def to_dict(self) -> dict[str, int]:
        return {**self.classes, "other": self.other}


@dataclass(frozen=True)
class Device:
    """A machine that is reached by ssh and has a C compiler.

    Attributes:
        address: ``[user@]host[:port]``, or what else ssh takes; a host of its configuration too.
    """

    address: str

    def time(self, folder: Path, inputs: Sequence[str], rounds: int) -> list[float]:
        """Seconds of each run after the first, of an exported folder built there.

        Raises:
            ForeignError: with what the device said.
        """
        place = self._do("mktemp -d").strip()
        if not place.startswith("/"):
            raise ForeignError(f"{self.address}: mktemp -d answered {place!r}")
        there = shlex.quote(place)
        try:
            shutil.copy(_HERE / "timed.c", folder)
            names = [path.name for path in folder.iterdir() if path.suffix != ".part"]
            packed = subprocess.run(
                ["tar", "-cf", "-", "-C", str(folder), *names], capture_output=True, check=True
            )
            self._do(f"tar -xf - -C {there}", packed.stdout)
            main = "cc -O2 -I. -Dmodel_run_entry=timed_model_run_entry -c main.c -o main.o"
            link = shlex.join(["cc", "-O2", *_SOURCES, "timed.c", "main.o", "-lm", "-o", "program"])
            run = shlex.join(["./program", "--repeat", str(rounds + 1), *inputs, "-o", "out.npy"])
            lines = self._do(f"cd {there} && {main} && {link} && {run} 2>&1").split()
        finally:
            self._do(f"rm -rf {there}")
        try:
            return [int(line) / 1e9 for line in lines[1:]]
        except ValueError:
            raise ForeignError(f"{self.address}: the program said {' '.join(lines)}") from None

    def _do(self, command: str, given: bytes = b"") -> str:
        with_port = re.fullmatch(r"[^:/]+:[0-9]+", self.address)
        place = f"ssh://{self.address}" if with_port else self.address
        done = subprocess.run(
            ["ssh", "-o", "BatchMode=yes", "--", place, command],
            input=given, capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            said = (done.stderr or done.stdout).decode().strip() or f"exit code {done.returncode}"
            raise ForeignError(f"{self.address}: {said}")
        return done.stdout.decode()


def _llvm_mca() -> str | None:
    """The newest there is; Debian's have their version in their names."""
    names = [f"llvm-mca-{version}" for version in range(30, 13, -1)]
    return next((name for name in (*names, "llvm-mca") if shutil.which(name)), None)


def _run(command: Sequence[str], folder: Path, stdin: Any = None, stdout: Any = None) -> str:
    """What a command says on stderr."""
    done = subprocess.run(
        command,
        cwd=folder,
        stdin=stdin,
        stdout=stdout or subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ForeignError(f"{command[0]}: {done.stderr.strip() or done.returncode}")
    return done.stderr
