"""A layer with experts all the way: compiled, saved, as ONNX, and as C under sanitizers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Llama4TextConfig, MixtralConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import sparsify
from sparsify.codegen.emit.onnx import export
from sparsify.frontend.torch import import_torch
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.partition import Partition
from sparsify.passes.propagate_lanes import PropagateLanes
from sparsify.passes.select_experts import SelectExperts
from sparsify.passes.select_layout import SelectLayout
from sparsify.report import Report

SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


KINDS: dict[str, tuple[Any, Any]] = {
    "mixtral": (MixtralSparseMoeBlock, MixtralConfig),
    "llama4": (Llama4TextMoe, Llama4TextConfig),
}


class Net(nn.Module):
    """A mixture between two linears, with the residual that decoders have."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        block, config = KINDS[kind]
        self.config = config(
            hidden_size=24, intermediate_size=40, num_local_experts=6, num_experts_per_tok=2
        )
        self.enter, self.leave = nn.Linear(10, 24), nn.Linear(24, 7)
        self.block = block(self.config)
        for parameter in self.block.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        made = self.block(h)
        if isinstance(made, tuple):  # with the router's logits, and of tokens in one row
            made = made[0].view(h.shape)
        return self.leave(h + made)


@pytest.fixture(
    scope="module",
    params=[
        ("mixtral", "packed_dense"),
        pytest.param(("mixtral", "sell"), marks=pytest.mark.slow),
        pytest.param(("llama4", "packed_dense"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The kind of mixture, and the layout of its experts."""
    found: tuple[str, str] = request.param
    return found


@pytest.fixture(scope="module")
def net(case: tuple[str, str]) -> Net:
    return Net(case[0]).eval()


@pytest.fixture(scope="module")
def compiled(case: tuple[str, str], net: Net) -> Any:
    binding = (SelectLayout(), SelectExperts(case[1]), PropagateLanes(), Partition())
    x = torch.randn(2, 20, 10)
    return sparsify.compile(net, (x,), passes=(*PORTABLE, *binding), strict=True, num_threads=2)


def expected(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.config._experts_implementation_internal = "eager"
    with torch.no_grad():
        return net(x)


SHAPES = ((1, 1), (1, 7), (2, 17), (3, 40))


def test_it_equals_eager(compiled: Any, net: Net) -> None:
    for shape in SHAPES:
        x = torch.randn(*shape, 10)
        torch.testing.assert_close(compiled(x), expected(net, x), atol=1e-5, rtol=1e-5)


def test_a_saved_one_does_too(compiled: Any, net: Net, tmp_path: Path) -> None:
    compiled.save(tmp_path / "net.sparsify")
    loaded = sparsify.load(tmp_path / "net.sparsify")
    x = torch.randn(2, 17, 10)
    torch.testing.assert_close(loaded(x), expected(net, x), atol=1e-5, rtol=1e-5)


def test_in_onnx_runtime(compiled: Any, net: Net, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    compiled.export_onnx(tmp_path / "net.onnx")
    session = ort.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        x = torch.randn(*shape, 10)
        (found,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected(net, x), atol=1e-5, rtol=1e-5)


def test_experts_with_zeros_take_few_bytes_in_onnx(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    net, path, x = Net("mixtral").eval(), tmp_path / "net.onnx", torch.randn(2, 17, 10)
    with torch.no_grad():
        for parameter in net.block.experts.parameters():
            parameter *= torch.rand_like(parameter) < 0.3
    portable = run_pipeline(import_torch(net, (x,)), PORTABLE)
    summary = export(portable.programs["forward"], Report(portable.decisions), path)
    assert summary.nodes["sparsify.ExpertsBitmapGatedSilu"] == 1
    for name in ("gate_up_proj", "down_proj"):
        weight = summary.weights[f"block.experts.{name}"]
        assert weight.nbytes < 0.4 * weight.dense_nbytes
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        x = torch.randn(*shape, 10)
        (found,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected(net, x), atol=1e-5, rtol=1e-5)


@pytest.mark.isa("x86-avx2")
def test_as_c(compiled: Any, net: Net, host: Any, tmp_path: Path) -> None:
    compiled.export_c(tmp_path, target="x86-avx2", largest={"x": (3, 40, 10)})
    program = host.build(tmp_path, flags=SANITIZERS)
    for shape in SHAPES:
        x = torch.randn(*shape, 10)
        np.save(tmp_path / "x.npy", x.numpy())
        host.run(program, "x.npy", "-o", "y.npy")
        found = torch.from_numpy(np.load(tmp_path / "y.npy"))
        torch.testing.assert_close(found, expected(net, x), atol=1e-5, rtol=1e-5)
