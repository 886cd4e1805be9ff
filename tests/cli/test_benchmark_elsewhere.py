"""sparsify benchmark for other machines: counts of an emulator, times over ssh."""

import asyncio
import contextlib
import json
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsify.bench.foreign import Device, ForeignError

CONFIG = """
IdentityFile {keys}/user
UserKnownHostsFile {keys}/known
Host board
    HostName 127.0.0.1
    Port {port}
Host nowhere
    HostName 127.0.0.1
    Port 1
"""


@contextlib.contextmanager
def serving(keys: Path, temporary: Path) -> Iterator[int]:
    """The port of an ssh server on this machine, whose shells make their folders in one place."""
    asyncssh = pytest.importorskip("asyncssh")
    for name in ("server", "user"):
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(keys / name)
        key.write_public_key(keys / f"{name}.pub")
        (keys / name).chmod(0o600)

    async def run(process: "asyncssh.SSHServerProcess[bytes]") -> None:
        done = await asyncio.to_thread(
            subprocess.run,
            ["sh", "-c", process.command],
            input=await process.stdin.read(),
            capture_output=True,
            env={**os.environ, "TMPDIR": str(temporary)},
            check=False,
        )
        process.stdout.write(done.stdout)
        process.stderr.write(done.stderr)
        process.exit(done.returncode)

    ready: queue.SimpleQueue[tuple[int, Any, asyncio.Event]] = queue.SimpleQueue()

    async def serve() -> None:
        async with await asyncssh.listen(
            "127.0.0.1",
            port=0,
            server_host_keys=[str(keys / "server")],
            authorized_client_keys=str(keys / "user.pub"),
            process_factory=run,
            encoding=None,
        ) as server:
            stop = asyncio.Event()
            ready.put((server.get_port(), asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    port, loop, stop = ready.get(timeout=30)
    known = (keys / "server.pub").read_text()
    (keys / "known").write_text(f"[127.0.0.1]:{port} {known}")
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An ssh client that knows the host ``board``, which is this machine; its temporary folder."""
    client = shutil.which("ssh")
    if client is None:
        pytest.skip("no ssh: make edge-deps")
    keys, temporary, tools = (tmp_path / name for name in ("keys", "temporary", "tools"))
    for folder in (keys, temporary, tools):
        folder.mkdir()
    with serving(keys, temporary) as port:
        (tmp_path / "port").write_text(str(port))
        (keys / "config").write_text(CONFIG.format(keys=keys, port=port))
        tool = tools / "ssh"
        tool.write_text(f'#!/bin/sh\nexec {client} -F {keys / "config"} "$@"\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
        yield temporary


@pytest.mark.isa("x86-avx2")
def test_times_of_a_device(cli, tiny: str, board: Path) -> None:
    options = ("--target", "x86-avx2", "--device", "pi@board", "--rounds", 7, "--json")
    done = cli("benchmark", tiny, *options)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["device"] == "pi@board" and record["runs"] == 7
    assert 0 < record["p10_ms"] <= record["p50_ms"] <= record["p90_ms"]
    assert not list(board.iterdir()), "what was built there is left"


def test_addresses_of_devices(board: Path) -> None:
    """A host of ssh's configuration, one with a port, a URI; never an option of ssh."""
    port = (board.parent / "port").read_text()
    for address in ("pi@board", f"pi@127.0.0.1:{port}", f"ssh://pi@127.0.0.1:{port}"):
        assert Device(address)._do("echo here; cat", b" and there") == "here\n and there"
    with pytest.raises(ForeignError, match="hostname contains invalid characters"):
        Device("-oProxyCommand=true")._do("true")


@pytest.mark.isa("x86-avx2")
def test_a_device_that_cannot_be_reached(cli, tiny: str, board: Path) -> None:
    done = cli("benchmark", tiny, "--target", "x86-avx2", "--device", "pi@nowhere")
    assert done.exit_code == 2
    assert "pi@nowhere: ssh: connect to host 127.0.0.1 port 1: Connection refused" in done.stderr


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
