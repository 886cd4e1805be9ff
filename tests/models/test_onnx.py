"""Real ONNX files: imported, compiled, and equal to ONNX Runtime."""

from __future__ import annotations

import importlib.util
import json
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparsify
from sparsify.frontend.onnx.capture import capture_onnx
from sparsify.frontend.torch import capture, import_torch, normalise
from sparsify.passes import PORTABLE, run_pipeline

ort = pytest.importorskip("onnxruntime")

TOLERANCE = 1e-4
"""Of the output's scale, or of 1."""


def packaged(package: str, *parts: str) -> Path:
    """A file of a package that is not imported: its own dependencies are not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"package {package} is not installed")
    return Path(spec.submodule_search_locations[0], *parts)


def check(
    call: Any, path: Path, inputs: dict[str, Any], fixed: dict[str, Any] | None = None
) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(path, options)
    wanted = session.run(None, {**inputs, **(fixed or {})})
    found = call(*map(torch.from_numpy, inputs.values()))
    for expected, y in zip(wanted, found.values(), strict=True):
        error = np.abs(y.numpy().astype(np.float64) - expected).max()
        assert error <= TOLERANCE * max(1.0, np.abs(expected).max())
    return wanted


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


@pytest.mark.slow
def test_magika_gives_the_same_answers() -> None:
    folder = packaged("magika", "models", "standard_v3_3")
    config = json.loads((folder / "config.min.json").read_text())
    labels, size, pad = config["target_labels_space"], config["beg_size"], config["padding_token"]
    known = {".py": "python", ".h": "c", ".so": "elf", ".json": "json", ".toml": "toml"}
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {kind: sorted(root.rglob(f"*{kind}"))[:20] for kind in known}
    files = [
        (path, known[kind])
        for kind, paths in found.items()
        for path in paths
        if path.stat().st_size > 300
    ]
    assert len(files) >= 20
    rows = []
    for path, _ in files:
        data, end = path.read_bytes(), config["end_size"]
        block = config["block_size"]
        begin, last = data[:block].lstrip()[:size], data[-block:].rstrip()[-end:] if end else b""
        rows.append(
            [*begin, *[pad] * (size - len(begin)), *[pad] * (end - len(last)), *last][: size + end]
        )
    compiled = sparsify.compile(folder / "model.onnx", num_threads=1)
    features = np.array(rows, np.int32)
    (scores,) = check(compiled, folder / "model.onnx", {"bytes": features})
    ours = compiled(torch.from_numpy(features))["target_label"].numpy()
    assert (ours.argmax(1) == scores.argmax(1)).all()
    right = [labels[i] == label for i, (_, label) in zip(ours.argmax(1), files, strict=True)]
    assert np.mean(right) > 0.8


DETECTED = [(1, 3, 96, 64), (2, 3, 64, 160), (1, 3, 320, 256), (1, 3, 32, 32)]
OCR = {
    "det": ("ch_PP-OCRv4_det_infer.onnx", ("N", 3, "H", "W"), DETECTED),
    "rec": ("ch_PP-OCRv4_rec_infer.onnx", ("N", 3, 48, "W"), [(1, 3, 48, 100), (2, 3, 48, 160)]),
    "cls": ("ch_ppocr_mobile_v2.0_cls_infer.onnx", ("N", 3, 48, 192), [(3, 3, 48, 192)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OCR)
def test_pp_ocr(kind: str) -> None:
    name, declared, shapes = OCR[kind]
    path = packaged("rapidocr_onnxruntime", "models", name)
    compiled = sparsify.compile(path, num_threads=1, shapes={"x": declared}, strict=kind == "det")
    for shape in shapes:
        check(compiled, path, {"x": random(*shape)})


@pytest.mark.parametrize("name", ["silero_vad", "silero_vad_openvino_16k"])
def test_silero_vad(name: str) -> None:
    path = packaged("silero_vad", "data", f"{name}.onnx")
    branching = name == "silero_vad"
    rate = {"sr": np.array(16000, np.int64)} if branching else {}
    shapes = {"input": (1, 576), "state": (2, 1, 128)}
    compiled = sparsify.compile(path, num_threads=1, shapes=shapes, constants=rate, strict=True)
    state = np.zeros((2, 1, 128), np.float32)
    for _ in range(3):
        inputs = {"input": random(1, 576) * 0.1, "state": state}
        _, state = check(compiled, path, inputs, rate)


def exported(model: torch.nn.Module, inputs: Any, folder: Path, dynamo: bool, names: Any) -> Path:
    """The model as PyTorch's new exporter or its old one writes it, all first dims dynamic."""
    path = folder / "model.onnx"
    dims = {d: name for d, name in enumerate(("batch", "length")) if inputs[0].dim() > d}
    dims = dims if len(inputs) > 1 else {0: "batch"}
    options: dict[str, Any] = {"dynamic_axes": dict.fromkeys(names, dims)}
    if dynamo:
        sizes = {d: torch.export.Dim(name, max=512) for d, name in dims.items()}
        options = {"dynamic_shapes": (sizes,) * len(inputs), "external_data": False}
    torch.onnx.export(
        model, inputs, path, dynamo=dynamo, input_names=names, verbose=False, **options
    )
    return path


class Pictures(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
                torch.nn.init.uniform_(module.running_var, 0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits


def resnet18() -> torch.nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000
    )
    return ResNetForImageClassification(config)


def mobilenet_v2() -> torch.nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000))


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("make", [resnet18, mobilenet_v2])
def test_convolutional_networks(make: Callable[..., Any], dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Pictures(make()).eval()
    path = exported(model, (torch.randn(2, 3, 64, 64),), tmp_path, dynamo, ["x"])
    compiled = sparsify.compile(path, num_threads=1)
    for batch in (1, 3):
        check(compiled, path, {"x": random(batch, 3, 64, 64)})


class Sentences(torch.nn.Module):
    def __init__(self, bert: torch.nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        return self.bert(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state


SENTENCES = ("input_ids", "attention_mask", "token_type_ids")


def portable(programs: Any) -> tuple[Counter[str], dict[str, str]]:
    """Operators of ours in the portable program, and the verdict of each linear layer."""
    result = run_pipeline(programs, PORTABLE)
    calls = [str(n.target) for n in result.programs["forward"].graph.nodes]
    verdicts = {
        d.site: f"{d.verdict} {d.layout}" for d in result.decisions if d.made_by == "sparse_linear"
    }
    return Counter(c for c in calls if c.startswith("sparsify")), verdicts


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_minilm_is_the_same_from_pytorch_and_from_onnx(
    minilm: torch.nn.Module, dynamo: bool, tmp_path: Path
) -> None:
    model = Sentences(minilm).eval()
    ids = torch.randint(1000, 30000, (2, 16))
    inputs = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    path = exported(model, inputs, tmp_path, dynamo, list(SENTENCES))
    program = capture(capture_onnx(path))
    assert portable(normalise(program)) == portable(import_torch(model, inputs))
    compiled = sparsify.compile(path, num_threads=1)
    for batch, length in ((1, 23), (3, 7)):
        mask = np.ones((batch, length), np.int64)
        mask[-1, length // 2 :] = 0
        words = np.random.default_rng(length).integers(1000, 30000, (batch, length))
        given = (words, mask, np.zeros_like(words))
        check(compiled, path, dict(zip(SENTENCES, given, strict=True)))
