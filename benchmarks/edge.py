"""MiniLM-L6 exported as C for a foreign CPU: instructions of one run, counted in an emulator.

    make edge-deps
    python -m benchmarks.edge
    python -m benchmarks.edge --target cortex-a72 --sparsity 0 90 --seq 128

The counts are proxies for speed and no times: they say what an implementation asks of the CPU, not
how long the CPU takes. Those of a run are the difference between two runs and one, so that start
and files do not count. Bytes are those of the program without weights; the error is the largest
against PyTorch on this machine, over the output's largest value.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.minilm import load
from sparsify.bench.foreign import Emulated, ForeignError

SPARSITIES = (0, 80, 90)


def emulated(target: str) -> Emulated:
    """Raises SystemExit where the target's tools are not there."""
    from sparsify.codegen.target import Target

    chosen = Target.parse(target)
    try:
        return Emulated.of(chosen.machine, str(dict(chosen.spec)["mcpu"]))
    except ForeignError as error:
        raise SystemExit(f"--target {target}: {error}") from None


def program_bytes(machine: Emulated, folder: Path) -> int:
    """Code and data of all but the weights and the C library."""
    objects = []
    for source in ("model.c", "sparsify.c", "serial.c"):
        made = folder / f"{source}.o"
        command = [f"{machine.prefix}-gcc", "-O2", "-I.", "-c", source, "-o", str(made)]
        subprocess.run(command, cwd=folder, check=True)
        objects.append(str(made))
    sizes = subprocess.run(
        [f"{machine.prefix}-size", *objects, str(folder / "model_kernels.o")],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()[1:]  # fmt: skip
    return sum(int(text) + int(data) for text, data, *_ in map(str.split, sizes))


def measure(target: str, sparsity: int, seq: int, folder: Path) -> dict[str, Any]:
    import sparsify

    machine = emulated(target)
    model = load(sparsity)
    ids = torch.randint(1000, 30000, (1, seq), generator=torch.Generator().manual_seed(seq))
    compiled = sparsify.compile(model, {"input_ids": ids})
    compiled.export_c(folder, target=target)
    np.save(folder / "x.npy", ids.numpy())
    counts = machine.count(machine.build(folder), ["x.npy", "-o", "out.npy"]).to_dict()
    with torch.no_grad():
        expected = model(ids)[0].numpy()
    error = np.abs(np.load(folder / "out.npy") - expected).max() / np.abs(expected).max()
    size = program_bytes(machine, folder)
    return {"sparsity": sparsity, "instructions": counts, "bytes": size, "error": float(error)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", default="cortex-a72", help="see 'sparsify targets'")
    parser.add_argument("--sparsity", type=int, nargs="+", default=SPARSITIES, help="percent")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="one line for each sparsity")
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    first: dict[str, int] | None = None
    if not given.json:
        print(f"proxies, no times: instructions of one run on {given.target}, 1 x {given.seq}")
        print(f"{'zeros':>6}{'millions':>10}{'of first':>10}{'fma':>8}{'loads':>8}", end="")
        print(f"{'KB':>7}{'error':>10}")
    for sparsity in given.sparsity:
        with tempfile.TemporaryDirectory(prefix="sparsify-edge-") as folder:
            cell = measure(given.target, sparsity, given.seq, Path(folder))
        counts = cell["instructions"]
        first = first or counts
        if given.json:
            print(json.dumps(cell), flush=True)
            continue
        millions = {name: count / 1e6 for name, count in counts.items()}
        part = counts["all"] / first["all"]
        print(f"{sparsity:>5}%{millions['all']:>10.1f}{part:>10.3f}{millions['fma']:>8.1f}", end="")
        print(f"{millions['loads']:>8.1f}{cell['bytes'] / 1e3:>7.0f}{cell['error']:>10.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
