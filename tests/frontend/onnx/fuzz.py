"""Damages ONNX models at random: each is refused with a reason that names the file, or right.

    python -m tests.frontend.onnx.fuzz --count 200 --seed 0

A model with control flow, functions and operators of ONNX Runtime, and models of packages where
they are installed, lose attributes, change types, sizes, names, edges, versions and bytes. Each
import runs in a process of its own, with so much memory and time and no more. What is imported is
run by PyTorch and compared with ONNX Runtime, if that takes the file. What is neither refused nor
right is printed and kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pickle
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper, parser

from sparsify.frontend.onnx.capture import capture_onnx
from tests.frontend.onnx.mutations import damaged

SECONDS = 60
"""Of CPU time; other processes may take ten times as much besides."""
MEMORY = 4 * 2**30
"""Of address space beyond what the process has before the import."""
TOLERANCE = 1e-3
FINE = ("refused", "imported", "right")
"""Refused, imported where there is nothing to compare with, or equal to ONNX Runtime."""

_SMALL = """
<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1, "own": 1]>
g (float[N, 8] x, int64[1] chosen) => (float[N, 8] y, float[K, N, 8] steps)
<float[8, 8] w, float[8] b, float[8] gain, bool yes = {1}, int64 times = {3},
 int64[2] shape = {-1, 8}, float[2] bounds = {-3, 3}>
{
  h = com.microsoft.FusedMatMul <transB: int = 1, alpha: float = 0.5> (x, w)
  n = com.microsoft.SkipLayerNormalization <epsilon: float = 0.00001> (h, x, gain, b)
  m = com.microsoft.BiasGelu (n, b)
  f = own.Twice <by: float = 2.0> (m)
  r = Reshape (f, shape)
  picked = If (yes) <
    then_branch = yes_graph () => (float[N, 8] t) { t = Relu(r) },
    else_branch = no_graph () => (float[N, 8] e) { e = Neg(r) }
  >
  y0, steps = Loop (times, yes, picked) <
    body = step (int64 i, bool go, float[N, 8] v)
        => (bool again, float[N, 8] next, float[N, 8] kept)
    {
      again = Identity(go)
      a = Add(v, b)
      next = Tanh(a)
      kept = Identity(next)
    }
  >
  row = Gather <axis: int = 1> (y0, chosen)
  s = Shape(y0)
  wide = Expand(row, s)
  total = Sum(y0, wide)
  low, high = Split <axis: int = 1> (total)
  both = Concat <axis: int = -1> (high, low)
  y = Softmax <axis: int = 1> (both)
}
<domain: "own", opset_import: ["": 17]>
Twice <by> (v) => (doubled) {
  factor = Constant <value_float: float = @by> ()
  doubled = Mul(v, factor)
}
"""


def small_model() -> onnx.ModelProto:
    """Control flow, a function, and operators of ONNX Runtime, with weights."""
    model = parser.parse_model(_SMALL)
    rng = np.random.default_rng(0)
    weights = {"w": (8, 8), "b": (8,), "gain": (8,)}
    kept = [t for t in model.graph.initializer if t.name not in weights]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for name, shape in weights.items():
        array = rng.standard_normal(shape, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


_PACKAGED = {
    "magika": "models/standard_v3_3/model.onnx",
    "silero_vad": "data/silero_vad.onnx",
    "rapidocr_onnxruntime": "models/ch_PP-OCRv4_rec_infer.onnx",
}


OPTIONS: dict[str, dict[str, Any]] = {
    "silero_vad": {
        "shapes": {"input": (1, 576), "state": (2, 1, 128)},
        "constants": {"sr": np.array(16000)},
    },
    "rapidocr_onnxruntime": {"shapes": {"x": ("N", 3, 48, "W")}},
}
"""What importing a model needs to be told."""


def models() -> dict[str, onnx.ModelProto]:
    found = {"small": small_model()}
    for package, part in _PACKAGED.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            found[package] = onnx.load(Path(spec.submodule_search_locations[0], part))
    return found


def checked(path: Path, name: str) -> str:
    """One of `FINE`; anything else is a fault."""
    try:
        program = capture_onnx(path, **OPTIONS.get(name, {}))
    except (ValueError, TypeError, FileNotFoundError) as error:
        if not str(error).startswith(str(path)):
            return f"an error that does not begin with the file: {traceback.format_exc()}"
        return "refused"
    return _compared(program, path) if name == "small" else "imported"


def _compared(program: Any, path: Path) -> str:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    args, kwargs = program.example_inputs
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        given = [t.numpy() for t in (*args, *kwargs.values())]
        wanted = session.run(None, dict(zip(names, given, strict=True)))
    except Exception:
        return "imported"
    found = program.module()(*args, **kwargs)
    for name, expected in zip([o.name for o in session.get_outputs()], wanted, strict=True):
        y = found[name].detach().numpy()
        if y.shape != expected.shape:
            return f"{name}: shape {y.shape}, ONNX Runtime {expected.shape}"
        error = np.nan_to_num(np.abs(y.astype(np.float64) - expected)).max(initial=0)
        if error > TOLERANCE * max(1.0, np.abs(np.nan_to_num(expected)).max(initial=0)):
            return f"{name}: error {error} from ONNX Runtime"
    return "right"


def isolated(work: Callable[[], str]) -> str:
    """What ``work`` gives in a child process, or how that ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        signal.alarm(10 * SECONDS)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        try:
            result = work()
        except BaseException:
            result = traceback.format_exc()
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        number = os.WTERMSIG(status)
        return f"ended by signal {number}" + (
            " (too slow)" if number in (signal.SIGALRM, signal.SIGXCPU) else ""
        )
    return str(pickle.loads(data))


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--count", type=int, default=200, help="of each model")
    options.add_argument("--seed", type=int, default=0, help="of the first")
    options.add_argument("--model", action="append", help="only this one")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    for name, model in models().items():
        if chosen.model and name not in chosen.model:
            continue
        for seed in range(chosen.seed, chosen.seed + chosen.count):
            what, data = damaged(model, seed)
            path = folder / f"{name}_{seed}.onnx"
            path.write_bytes(data)
            result = isolated(lambda path=path, name=name: checked(path, name))
            if result in FINE:
                outcomes[f"{name} {result}"] += 1
                path.unlink()
                continue
            outcomes[f"{name} FAULT"] += 1
            print(f"{path} ({what}):\n{result}", flush=True)
    print(dict(outcomes))
    return int(any(key.endswith("FAULT") for key in outcomes))


if __name__ == "__main__":
    sys.exit(main())
