"""The line about the machine, and the binding of threads."""

import os
from pathlib import Path

import pytest
import torch

from sparsify.bench import Machine, threads


def test_a_processor_is_described(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Fast One\nflags\t: fpu avx2 fma avx512f\nmodel name\t: no\n")
    machine = Machine.here(cpuinfo)
    assert machine.cpu == "Fast One"
    assert machine.isa == ("AVX-512", "AVX2", "FMA")
    assert machine.line(2).startswith("Fast One (AVX-512, AVX2, FMA), 2 threads of ")
    cpuinfo.write_text("Features\t: fp asimd sve\n")
    assert Machine.here(cpuinfo).isa == ("SVE", "NEON")


def test_without_cpuinfo_the_machine_still_has_a_name(tmp_path: Path) -> None:
    machine = Machine.here(tmp_path / "absent")
    assert machine.cpu
    assert machine.isa == ()


def test_threads_are_bound_and_released() -> None:
    allowed, count = os.sched_getaffinity(0), torch.get_num_threads()
    with pytest.raises(KeyError), threads(1):
        assert len(os.sched_getaffinity(0)) == 1
        assert torch.get_num_threads() == 1
        raise KeyError
    assert os.sched_getaffinity(0) == allowed
    assert torch.get_num_threads() == count


@pytest.mark.parametrize("count", [0, 100_000])
def test_a_count_the_machine_cannot_give_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="processors are there"), threads(count):
        pass
