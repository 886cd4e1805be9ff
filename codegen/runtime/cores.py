"""How many cores this process may keep busy: affinity, hyper-threads and CPU quota considered."""

import math
import os
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Physical cores in the affinity mask of the calling thread, at most the cgroup's CPU quota.

    Two hardware threads of one core count once: they share the vector units that the kernels
    fill. Where the system does not tell, every logical CPU counts as a core.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    else:
        cores = os.cpu_count() or 1
    return max(1, min(cores, _quota()))


def _siblings(cpu: int) -> str:
    try:
        return (CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quota() -> int:
    """The least CPU quota (cgroup v2 `cpu.max`) of the process's group and its parents."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    group = next((line[3:] for line in lines if line.startswith("0::")), "/")
    inside = CGROUPS / group.lstrip("/")
    limits = [_limit(folder / "cpu.max") for folder in (inside, *inside.parents, CGROUPS)]
    return min(limits)


def _limit(file: Path) -> int:
    """Cores allowed by a `cpu.max` file, `"<quota us or max> <period us>"`."""
    try:
        quota, period = file.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return 1 << 30
