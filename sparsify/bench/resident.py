"""Resident memory that a model costs, measured in a fresh process that holds nothing else.

The process imports the runtime, notes its resident size, loads the model from its file, runs it
once, and notes the size again. It is its own program: ``python -m sparsify.bench.resident``.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sparsify.bench.machine import threads as bound_threads
from sparsify.bench.models import load_exported
from sparsify.bench.peer import flat_tensors, split_inputs
from sparsify.bench.prefill import CompiledPrefill
from sparsify.bench.runtimes import onnxruntime_peer, openvino_peer

KINDS = ("sparsify", "torch", "onnxruntime", "openvino")
_STATUS = Path("/proc/self/status")


def resident_bytes(kind: str, path: Path, inputs: Any, threads: int) -> int | None:
    """Growth of resident memory by loading ``path`` and running it once.

    Args:
        kind: one of `KINDS`; the file is a compiled model, a ``.pt2`` or an ONNX file.
        inputs: what to run it with; for ONNX a mapping by input name, for a compiled language
            model the token ids of a prompt.

    Returns:
        Bytes, or None where the system has no ``/proc``.

    Raises:
        ValueError: the process failed; with the last line that it printed.
    """
    if not _STATUS.is_file():
        return None
    with tempfile.TemporaryDirectory(prefix="sparsify-resident-") as folder:
        stored = Path(folder, "inputs.pt")
        torch.save(split_inputs(inputs), stored)
        arguments = [kind, str(path), str(stored), str(threads)]
        command = [sys.executable, "-m", "sparsify.bench.resident", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(f"measuring the memory of {kind} failed: {last}")
    return int(done.stdout.split()[-1])


def _run(kind: str, path: Path, args: Any, kwargs: Any, threads: int) -> Any:
    """Loads and runs once; what is returned keeps the model alive."""
    if kind == "onnxruntime":
        peer = onnxruntime_peer(path, kwargs, threads)
        return peer, peer.outputs()
    if kind == "openvino":
        peer = openvino_peer(path, kwargs, threads)
        return peer, peer.outputs()
    if kind == "torch":
        module = load_exported(path).module()
    else:
        import sparsify

        module = sparsify.load(path)
        if isinstance(module, sparsify.CompiledCausalLM):
            module = CompiledPrefill(module)
    with torch.no_grad():
        return module, flat_tensors(module(*args, **kwargs))


def _import(kind: str) -> None:
    if kind == "onnxruntime":
        import onnxruntime  # noqa: F401
    elif kind == "openvino":
        import openvino

        openvino.Core()
    elif kind == "sparsify":
        import tvm  # noqa: F401

        import sparsify.loader  # noqa: F401
    if kind in ("sparsify", "torch") and importlib.util.find_spec("transformers"):
        # Programs that return its output classes import it when loaded.
        import transformers.modeling_outputs  # noqa: F401


def _resident() -> int:
    gc.collect()
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the resident bytes a model costs.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("path", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("threads", type=int)
    given = parser.parse_args()
    args, kwargs = torch.load(given.inputs)
    with bound_threads(given.threads):
        _import(given.kind)
        before = _resident()
        alive = _run(given.kind, given.path, args, kwargs, given.threads)
        after = _resident()
    assert alive
    print(max(0, after - before))


if __name__ == "__main__":
    main()
