"""Peers compute what the model computes, from the same inputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.bench import (
    MATMUL_PEERS,
    MODEL_PEERS,
    OnnxModel,
    compiled_peer,
    flat_tensors,
    float64_reference,
    matmul_peers,
    model_peers,
    split_inputs,
)
from sparsify.bench.resident import resident_bytes

TOLERANCE = 1e-5


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16)
        self.linear = nn.Linear(16, 24)

    def forward(self, tokens: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(self.embedding(tokens)) * scale
        return {"y": y, "sum": y.sum(-1)}


def inputs(by_name: bool) -> Any:
    tokens = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(1))
    scale = torch.full((1,), 1.5)
    return {"tokens": tokens, "scale": scale} if by_name else (tokens, scale)


@pytest.mark.parametrize("by_name", [False, True])
def test_model_peers_agree_with_float64(by_name: bool) -> None:
    model, given = TwoInputs().eval(), inputs(by_name)
    reference = float64_reference(model, given)
    assert [t.dtype for t in reference] == [torch.float64] * 2
    peers = model_peers(model, given, threads=1)
    assert tuple(peers) == MODEL_PEERS
    for peer in peers.values():
        absolute, relative = peer.check(reference, TOLERANCE)
        assert 0 <= relative < TOLERANCE
        assert absolute < 1
        peer()
        assert peer.version
    assert peers["onnxruntime"].file_bytes == peers["openvino"].file_bytes
    assert (peers["openvino"].file_bytes or 0) > 4 * (50 * 16 + 16 * 24)


def test_a_wrong_peer_is_caught() -> None:
    model = TwoInputs().eval()
    wrong = compiled_peer(lambda tokens, scale: model(tokens, scale * 1.001), inputs(False), 1)
    with pytest.raises(ValueError, match=r"sparsify: outputs differ .* by 1\.\d\de-03"):
        wrong.check(float64_reference(model, inputs(False)), TOLERANCE)


@pytest.mark.parametrize("name", MATMUL_PEERS)
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(48, 32, 16), (7, 31, 3), (1, 1, 1)])
def test_matmul_peers_agree_with_float64(name: str, rows: int, columns: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator)
    peer = matmul_peers(weight, x, 1, (name,))[name]
    peer.check((x.double() @ weight.double().t(),), TOLERANCE)


def test_unknown_peers_and_failed_exports_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown peers \['tensorrt'\]; known: torch"):
        model_peers(TwoInputs(), inputs(False), 1, ("tensorrt",))
    with pytest.raises(ValueError, match="unknown peers"):
        matmul_peers(torch.ones(1, 1), torch.ones(1, 1), 1, ("blas",))

    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ValueError, match="Branching cannot be exported to ONNX"):
        model_peers(Branching(), (torch.ones(2),), 1, ("openvino",))


def test_inputs_and_outputs_are_flattened() -> None:
    x = torch.ones(1)
    assert split_inputs(x) == ((x,), {})
    assert split_inputs((x, x)) == ((x, x), {})
    assert split_inputs({"x": x}) == ((), {"x": x})
    assert split_inputs(((x,), {"y": x})) == ((x,), {"y": x})
    assert len(flat_tensors({"a": (x, None, [x]), "b": 3})) == 2


@pytest.mark.parametrize("kind", ["torch", "onnxruntime", "openvino"])
def test_resident_memory_counts_the_weights(kind: str, tmp_path: Path) -> None:
    model = nn.Linear(3000, 3000, bias=False)
    onnx = OnnxModel.export(model, (torch.ones(1, 3000),))
    path = onnx.pt2() if kind == "torch" else onnx.path
    given = (torch.ones(1, 3000),) if kind == "torch" else onnx.feeds
    size = resident_bytes(kind, path, given, threads=1)
    assert size is not None
    assert 36e6 < size < 400e6


def test_a_process_that_fails_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="measuring the memory of openvino failed: "):
        resident_bytes("openvino", tmp_path / "absent.onnx", {}, 1)
