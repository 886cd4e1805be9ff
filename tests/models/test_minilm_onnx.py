"""MiniLM as an ONNX file in stock ONNX Runtime: right, small, and no slower than the dense file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import sparsify
from sparsify.bench import interleave, ratio
from sparsify.bench.runtimes import onnxruntime_peer
from sparsify.cli.models import quiet
from sparsify.codegen.emit.onnx import OnnxSummary, export
from sparsify.frontend.torch import import_torch
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.report import Report

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
"""Of the output's scale, against eager PyTorch."""
SHAPES = [(1, 1), (1, 2), (1, 15), (1, 16), (1, 17), (1, 128), (1, 511), (1, 512)]
SHAPES += [(2, 1), (2, 40), (3, 7), (5, 33), (8, 128), (15, 3), (16, 1)]
BYTES = {0.8: 0.45, 0.9: 0.30}
"""Most that the encoder's weights may take of their dense bytes."""


@dataclass(frozen=True)
class Files:
    """The pruned model, the file it was exported to, and the one of PyTorch's own exporter."""

    model: nn.Module
    sparsity: float
    path: Path
    standard: Path
    dense: Path
    summary: OnnxSummary


@pytest.fixture(scope="module", params=BYTES)
def files(
    request: pytest.FixtureRequest, minilm: nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> Files:
    model = copy.deepcopy(minilm)
    model.encoder = sparsify.prune(model.encoder, sparsify.Unstructured(request.param))
    folder = tmp_path_factory.mktemp("onnx")
    path, standard, dense = (folder / f"{n}.onnx" for n in ("sparse", "standard", "dense"))
    result = run_pipeline(import_torch(model, tokens(2, 128)), PORTABLE)
    (program,) = result.programs
    summary = export(program, Report(result.decisions), path)
    export(program, Report(result.decisions), standard, standard=True)
    sizes = {0: Dim("batch"), 1: Dim("sequence", max=512)}
    with quiet():
        torch.onnx.export(
            model,
            kwargs=tokens(2, 16),
            f=dense,
            dynamo=True,
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
            opset_version=18,
            external_data=False,
            verbose=False,
        )
    return Files(model, request.param, path, standard, dense, summary)


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 30522, (batch, length))
    ends = torch.randint(max(1, length // 2), length + 1, (batch, 1))
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < ends).long()}


def session(path: Path, optimised: Path | None = None) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def worst(found: list[Any], expected: Mapping[str, torch.Tensor]) -> float:
    pairs = zip(map(torch.from_numpy, found), expected.values(), strict=True)
    return max(float((f - e).abs().max() / e.abs().max()) for f, e in pairs)


def test_every_shape_is_right(files: Files) -> None:
    sessions = [session(files.path), session(files.standard)]
    for batch, length in SHAPES:
        inputs = tokens(batch, length)
        with torch.no_grad():
            expected = files.model(**inputs)
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        for runtime in sessions:
            assert worst(runtime.run(None, feeds), expected) <= TOLERANCE, (batch, length)


def test_the_checker_and_the_reference_evaluator_agree(files: Files) -> None:
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class GatherElements(OpRun):  # type: ignore[misc]
        """The package's own fails on more than 64 elements, as the model's token types are."""

        op_domain = ""

        def _run(self, data: Any, indices: Any, axis: int | None = None) -> tuple[Any]:
            return (np.take_along_axis(data, indices, axis=axis or 0),)

    onnx.checker.check_model(files.path, full_check=True)
    inputs = tokens(2, 9)
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    with torch.no_grad():
        expected = files.model(**inputs)
    evaluator = ReferenceEvaluator(str(files.path), new_ops=[GatherElements])
    assert worst(evaluator.run(None, feeds), expected) <= TOLERANCE


def test_the_encoder_is_stored_sparse(files: Files) -> None:
    encoder = {s: w for s, w in files.summary.weights.items() if s.startswith("encoder.")}
    stored, dense = (
        sum(getattr(w, n) for w in encoder.values()) for n in ("nbytes", "dense_nbytes")
    )
    assert len(encoder) == 6 * 4 and stored <= BYTES[files.sparsity] * dense
    saved = files.dense.stat().st_size - files.path.stat().st_size
    assert saved >= (1 - BYTES[files.sparsity]) * dense


def test_weights_are_unpacked_once_when_the_model_is_loaded(files: Files, tmp_path: Path) -> None:
    session(files.path, tmp_path / "optimised.onnx")
    left = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert not left & {"BitShift", "CumSum", "BitwiseAnd", "ScatterElements"}


def test_it_is_no_slower_than_the_dense_file(files: Files) -> None:
    for shape in [(1, 16), (1, 128), (8, 128)]:
        inputs = tokens(*shape)
        calls = {
            path.stem: onnxruntime_peer(path, inputs, 1).call for path in (files.path, files.dense)
        }
        samples = interleave(calls, rounds=7)
        assert ratio(samples["sparse"], samples["dense"]).median <= 1.05, shape
