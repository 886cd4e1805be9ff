"""The processor a benchmark ran on, and how many threads it was given."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_NAMED_FEATURES = (
    ("amx_tile", "AMX"),
    ("avx512f", "AVX-512"),
    ("avx512_vnni", "AVX-512 VNNI"),
    ("avx512_bf16", "AVX-512 BF16"),
    ("avx2", "AVX2"),
    ("fma", "FMA"),
    ("sve", "SVE"),
    ("asimd", "NEON"),
)


@dataclass(frozen=True)
class Machine:
    """CPU model, its vector instruction sets (best first) and the processors we may run on."""

    cpu: str
    isa: tuple[str, ...]
    processors: int

    @classmethod
    def here(cls, cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
        fields: dict[str, str] = {}
        if cpuinfo.is_file():
            for line in cpuinfo.read_text().splitlines():
                key, _, value = line.partition(":")
                fields.setdefault(key.strip(), value.strip())
        flags = set((fields.get("flags") or fields.get("Features") or "").split())
        isa = tuple(label for flag, label in _NAMED_FEATURES if flag in flags)
        name = fields.get("model name") or platform.processor() or platform.machine()
        return cls(name, isa, len(_processors()))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "isa": list(self.isa)}

    def line(self, count: int) -> str:
        """One line for the head of a table."""
        isa = ", ".join(self.isa) or "no known vector instructions"
        plural = "" if count == 1 else "s"
        return f"{self.cpu} ({isa}), {count} thread{plural} of {self.processors} processors"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Binds this thread, and those it starts, to ``count`` processors; sets torch's threads.

    Build and call every candidate inside, so that none can use a processor the others do not get.

    Raises:
        ValueError: when there are fewer processors than ``count``.
    """
    allowed = _processors()
    if not 1 <= count <= len(allowed):
        raise ValueError(f"{count} threads asked for, but 1 to {len(allowed)} processors are there")
    before = torch.get_num_threads()
    _bind(set(allowed[:count]))
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _bind(set(allowed))


def _processors() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _bind(processors: set[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, processors)
