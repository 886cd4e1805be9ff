"""Counting cores: hyper-threads count once, affinity and quota are respected."""

import os
from pathlib import Path

import pytest

from sparsify.codegen.runtime import cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight logical CPUs, CPU i and i + 4 being one core, without a quota."""
    for cpu in range(8):
        topology = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(cores, "CPUS", tmp_path / "cpu")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path


def test_hyper_threads_count_once(machine: Path) -> None:
    assert cores.available_cores() == 4


def test_affinity_is_respected(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4})
    assert cores.available_cores() == 2


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1), ("800000 100000", 4)],
)
def test_quota_is_respected(machine: Path, limit: str, expected: int) -> None:
    (machine / "cgroup").mkdir()
    (machine / "cgroup" / "cpu.max").write_text(limit + "\n")
    assert cores.available_cores() == expected


def test_unknown_topology_counts_every_cpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "CPUS", machine / "absent")
    assert cores.available_cores() == 8
