"""Runtimes for ARM out of their wheels, and an emulator in which they start.

Libraries look up which processor they are on in /proc/cpuinfo. There an emulator shows them this
machine's, and several then end with a segmentation fault; so it is given a folder to look into
first, with the C library and such a file of the processor that it emulates.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

from sparsify.bench.foreign import Emulated

PLATFORMS = ("manylinux_2_27_aarch64", "manylinux_2_28_aarch64")
_PARTS = {"cortex-a53": 0xD03, "cortex-a72": 0xD08, "cortex-a76": 0xD0B, "neoverse-n1": 0xD0C}
_DOT_PRODUCTS = ("cortex-a76", "neoverse-n1")


def fetch(requirement: str, folder: Path) -> zipfile.ZipFile:
    """A wheel for ARM, from the package index."""
    platforms = [argument for name in PLATFORMS for argument in ("--platform", name)]
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
        *(*platforms, "--dest", str(folder), requirement),
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def take(wheel: zipfile.ZipFile, part: str, path: Path) -> Path:
    """Writes the first file of a wheel whose name contains `part`."""
    name = next(name for name in wheel.namelist() if part in name)
    path.write_bytes(wheel.read(name))
    return path


def with_processor(machine: Emulated, folder: Path) -> Emulated:
    """The emulator with a description of its processor, which is made in a folder.

    Raises:
        SystemExit: for a processor that the emulator does not know.
    """
    if machine.cpu not in _PARTS:
        raise SystemExit(f"processors that are emulated: {', '.join(_PARTS)}; not {machine.cpu}")
    features = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
    if machine.cpu in _DOT_PRODUCTS:
        features += " atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
    facts = {
        "processor": "0",
        "Features": features,
        "CPU implementer": "0x41",
        "CPU architecture": "8",
        "CPU variant": "0x0",
        "CPU part": f"{_PARTS[machine.cpu]:#x}",
        "CPU revision": "0",
    }
    root = folder / "root"
    (root / "proc").mkdir(parents=True)
    (root / "lib").symlink_to(f"/usr/{machine.prefix}/lib")
    lines = [f"{name}\t: {value}\n" for name, value in facts.items()]
    (root / "proc" / "cpuinfo").write_text("".join(lines) + "\n")
    return replace(machine, emulator=(*machine.emulator[:-1], str(root)))
