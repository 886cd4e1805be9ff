"""ONNX Runtime and OpenVINO, set up alike: fp32, latency, the given threads, inputs bound once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsify.bench.peer import Peer


def onnxruntime_peer(
    model: Path | bytes,
    feeds: Mapping[str, torch.Tensor],
    threads: int,
    library: Path | None = None,
) -> Peer:
    """A session of ONNX Runtime's CPU provider; inputs and outputs are bound, not copied.

    Its default spinning stays on: it is faster so. `interleave` waits until the spinning ends.

    Args:
        model: an ONNX file, or its bytes.
        feeds: input name -> tensor; the shapes the session is run with.
        threads: intra-operator threads.
        library: of custom operators, to run the file with.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, tensor in feeds.items():
        binding.bind_cpu_input(name, tensor.detach().contiguous().numpy())
    for output in session.get_outputs():
        binding.bind_output(output.name)

    def call() -> None:
        session.run_with_iobinding(binding)

    def outputs() -> tuple[torch.Tensor, ...]:
        call()
        return tuple(torch.from_numpy(a.copy()) for a in binding.copy_outputs_to_cpu())

    settings = {"intra_op_num_threads": threads, "allow_spinning": True}
    return Peer("onnxruntime", ort.__version__, call, outputs, settings, _size(model))


def openvino_peer(model: Any, feeds: Mapping[str, torch.Tensor], threads: int) -> Peer:
    """An infer request of OpenVINO's CPU plugin in fp32.

    Args:
        model: an ONNX file, or an ``openvino.Model``.
        feeds: input name -> tensor, or position -> tensor given as ``"0"``, ``"1"`` ...
        threads: inference threads.
    """
    import openvino as ov

    core = ov.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    graph = core.read_model(str(model)) if isinstance(model, Path) else model
    compiled = core.compile_model(graph, "CPU", settings)
    request = compiled.create_infer_request()
    arrays = {
        int(name) if name.isdigit() else name: tensor.detach().contiguous().numpy()
        for name, tensor in feeds.items()
    }
    request.infer(arrays)  # later runs reuse the bound inputs

    def call() -> None:
        request.infer()

    def outputs() -> tuple[torch.Tensor, ...]:
        call()
        count = len(compiled.outputs)
        return tuple(
            torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in range(count)
        )

    return Peer("openvino", ov.__version__.split("-")[0], call, outputs, settings, _size(model))


def _size(model: Any) -> int | None:
    if isinstance(model, Path):
        return model.stat().st_size
    return len(model) if isinstance(model, bytes) else None
