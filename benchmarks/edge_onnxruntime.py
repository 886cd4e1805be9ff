"""Dense MiniLM-L6 in ONNX Runtime for ARM against exported C: instructions in an emulator.

    make edge-deps
    python -m benchmarks.edge_onnxruntime --seq 128

pip fetches ONNX Runtime's wheel for ARM, whose library a small C program calls. Counts are proxies
and no times. An emulator's processor decides which kernels ONNX Runtime takes: a Cortex-A72 has no
dot products and no fp16, so those of fp32 are compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from onnx import load as read_onnx

from benchmarks.arm_peers import fetch, take
from benchmarks.edge import emulated, measure
from benchmarks.minilm import load
from sparsify.bench import OnnxModel
from sparsify.bench.foreign import Emulated

RUNNER = Path(__file__).with_name("ort_run.c")
VERSION = "1.23.2"
"""1.32 ends with a segmentation fault when QEMU 7 loads it."""


def count_onnxruntime(machine: Emulated, seq: int, folder: Path) -> tuple[dict[str, int], float]:
    """Instructions of one run by class, and the largest error over the output's largest value."""
    model = load(0)
    ids = torch.randint(1000, 30000, (1, seq), generator=torch.Generator().manual_seed(seq))
    exported = OnnxModel.export(model, {"input_ids": ids})
    with fetch(f"onnxruntime=={VERSION}", folder) as wheel:
        library = take(wheel, "/libonnxruntime.so.", folder / "libonnxruntime.so.1")
    compiler = [f"{machine.prefix}-gcc", "-O2", str(RUNNER), str(library)]
    flags = [f"-Wl,-rpath,{folder}", "-Wl,--allow-shlib-undefined", "-o", "program"]
    subprocess.run([*compiler, *flags], cwd=folder, check=True)
    (folder / "ids").write_bytes(ids.numpy().tobytes())
    graph = read_onnx(exported.path).graph
    arguments = [str(exported.path), graph.input[0].name, graph.output[0].name, str(seq)]
    counts = machine.count(folder / "program", arguments, stdin="ids", stdout="floats")
    with torch.no_grad():
        expected = model(ids)[0].numpy()
    found = np.fromfile(folder / "floats", np.float32).reshape(expected.shape)
    return counts.to_dict(), float(np.abs(found - expected).max() / np.abs(expected).max())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", default="cortex-a72")
    parser.add_argument("--seq", type=int, default=128)
    given = parser.parse_args(arguments)
    machine = emulated(given.target)
    with tempfile.TemporaryDirectory(prefix="sparsify-") as folder:
        ours = measure(given.target, 0, given.seq, Path(folder))
    with tempfile.TemporaryDirectory(prefix="sparsify-") as folder:
        theirs, error = count_onnxruntime(machine, given.seq, Path(folder))
    print(f"proxies, no times: dense, millions of instructions on {given.target}, 1 x {given.seq}")
    for name, counts, wrong in (
        ("sparsify", ours["instructions"], ours["error"]),
        ("onnxruntime", theirs, error),
    ):
        shown = "".join(f"{kind:>8}{count / 1e6:>8.1f}" for kind, count in counts.items())
        print(f"{name:<12}{shown}   error {wrong:.1e}")
    print(f"ratio {ours['instructions']['all'] / theirs['all']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
