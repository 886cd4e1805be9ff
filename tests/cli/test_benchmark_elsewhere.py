"""sparsify benchmark for other machines: counts of an emulator, times over ssh."""

import json
import os
import shutil
from pathlib import Path

import pytest

SSH = """#!/bin/sh
# As ssh: options, a host, then one command for a shell there; here that is this machine.
test "$1 $2" = "-o BatchMode=yes" || exit 64
test "$3" = "{host}" || { echo "ssh: no route to $3" >&2; exit 255; }
echo "$4" >> "{log}"
exec sh -c "$4"
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh that reaches ``pi@board``; the file has its commands."""
    log, tool = tmp_path / "commands", tmp_path / "ssh"
    tool.write_text(SSH.replace("{host}", "pi@board").replace("{log}", str(log)))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return log


@pytest.mark.isa("x86-avx2")
def test_times_of_a_device(cli, tiny: str, ssh: Path) -> None:
    options = ("--target", "x86-avx2", "--device", "pi@board", "--rounds", 7, "--json")
    done = cli("benchmark", tiny, *options)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["device"] == "pi@board" and record["runs"] == 7
    assert 0 < record["p10_ms"] <= record["p50_ms"] <= record["p90_ms"]
    first, *_, last = ssh.read_text().splitlines()
    assert first == "mktemp -d"
    removed = last.removeprefix("rm -rf ")
    assert removed.startswith("/") and not Path(removed).exists()


@pytest.mark.isa("x86-avx2")
def test_a_device_that_cannot_be_reached(cli, tiny: str, ssh: Path) -> None:
    done = cli("benchmark", tiny, "--target", "x86-avx2", "--device", "pi@nowhere")
    assert done.exit_code == 2
    assert "pi@nowhere: ssh: no route to pi@nowhere" in done.stderr


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64")),
    reason="no aarch64-linux-gnu-gcc or qemu-aarch64: make edge-deps",
)
def test_proxies_of_another_machine(cli, tiny: str) -> None:
    done = cli("benchmark", tiny, "--target", "raspberry-pi/4b", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["proxies"].startswith("proxies for speed, no times")
    assert not any("ms" in key.split("_") for key in record)
    counts = record["instructions"]
    assert counts["all"] == sum(count for name, count in counts.items() if name != "all")
    products = 16 * (32 * 64 // 2 + 64 * 32)
    assert products / 4 < counts["fma"] < counts["all"] / 1.5
    assert record["agrees"] and record["max_rel_error"] < 1e-5
    assert sum(loop["turns"] * loop["instructions"] for loop in record["inner_loops"]) > 1000
    if any(loop["predicted_cycles"] is not None for loop in record["inner_loops"]):
        assert all(loop["predicted_cycles"] > 0 for loop in record["inner_loops"])


def test_a_machine_whose_instructions_are_not_counted(cli, tiny: str) -> None:
    done = cli("benchmark", tiny, "--target", "wasm-simd")
    assert done.exit_code == 2
    assert "instructions are counted on aarch64, armv7l, riscv64, not on wasm32" in done.stderr


def test_an_unknown_target_lists_those_there_are(cli, tiny: str) -> None:
    done = cli("benchmark", tiny, "--target", "cortex-z9")
    assert done.exit_code == 2
    assert "unknown target 'cortex-z9'; targets: native, x86-avx2" in done.stderr
