"""One binary for ONNX Runtime 1.17 and later, and for CPUs with AVX2 alone."""

import json
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsify import onnxruntime as ours
from tests.ops.domain.case import Case, compare, feeds_of, model_of

pytestmark = pytest.mark.slow

VERSIONS = {"1.17.3": "numpy<2", "1.20.1": "numpy<2.3", "1.24.1": "numpy", "1.32.0": "numpy"}
"""Releases, and the numpy that they run with."""

_SCRIPT = """
import json, sys
import numpy as np, onnxruntime as ort
model, library, data = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = 2
options.enable_profiling, options.profile_file_prefix = True, data
options.register_custom_ops_library(library)
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
given = dict(np.load(data))
(y,) = session.run(None, {i.name: given[i.name] for i in session.get_inputs()})
events = json.load(open(session.end_profiling()))
ran = sorted({e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["args"]})
error = float(abs(y - given["y"]).max())
print(json.dumps({"version": ort.__version__, "error": error, "ran": ran}))
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_the_library_runs_in(
    version: str, library: Path, model: Callable[..., bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    wanted = [f"onnxruntime=={version}", VERSIONS[version]]
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *wanted],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if installed.returncode:
        last = installed.stderr.strip().splitlines()[-1]
        pytest.skip(f"no wheels of {wanted} for Python {sys.version.split()[0]}: {last}")
    torch.manual_seed(0)
    weight = torch.randn(50, 30) * (torch.rand(50, 30) < 0.2)
    x, bias = torch.randn(21, 30), torch.randn(50)
    bits = weight != 0
    packed = torch.from_numpy(np.packbits(bits.numpy(), axis=1, bitorder="little"))
    inputs = {"x": x, "bits": packed, "values": weight[bits], "bias": bias}
    attributes = {"out_features": 50, "in_features": 30, "storage": "bitmap", "activation": "relu"}
    file, data = tmp_path / "model.onnx", tmp_path / "data.npz"
    file.write_bytes(model("LinearBitmapBiasRelu", inputs, attributes, 2))
    y = torch.relu(x.double() @ weight.double().T + bias.double()).float()
    np.savez(data, x=x.numpy(), y=y.numpy())
    done = subprocess.run(
        [python, "-c", _SCRIPT, str(file), str(library), str(data)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"] == version
    assert found["ran"] == ["LinearBitmapBiasRelu"]
    assert found["error"] < 1e-5


@pytest.mark.isa("x86-avx2")
def test_the_avx2_library_serves_the_whole_domain(domain: list[Case]) -> None:
    import onnxruntime

    path = ours.library("x86-avx2")
    for case in domain:
        model = model_of(case)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(path))
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        compare(session.run(None, feeds_of(case, model)), case)
