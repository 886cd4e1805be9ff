"""Models exported to ONNX: right in ONNX Runtime, stored sparse, and readable."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsify
from sparsify.codegen.emit.onnx import OnnxSummary, export
from sparsify.codegen.emit.onnx.weights import smallest
from sparsify.frontend.torch import import_torch
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.report import Report

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TOLERANCE = 1e-5
"""Of the scale of the compiled model's output."""


class Block(nn.Module):
    """A transformer's layer, after an embedding, and two outputs by name."""

    def __init__(self, sparsity: float = 0.8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 24)
        self.norm = nn.LayerNorm(24)
        self.query, self.key, self.value, self.out = (nn.Linear(24, 24) for _ in range(4))
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.weight *= torch.rand_like(module.weight) > sparsity

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.norm(self.embedding(ids))

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (4, 6)).transpose(1, 2)

        y = nn.functional.scaled_dot_product_attention(
            *(heads(project(x)) for project in (self.query, self.key, self.value)),
            attn_mask=mask[:, None, None, :],
        )
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return {"hidden": self.down(nn.functional.gelu(self.up(x))) + x, "first": x[:, 0]}


class Pictures(nn.Module):
    """Convolutions, a residual, pooling and a sparse classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 10)
        with torch.no_grad():
            self.head.weight *= torch.rand_like(self.head.weight) > 0.7

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        x = x + self.point(nn.functional.hardswish(self.depthwise(x)))
        return self.head(x.mean((2, 3)))


class Exported:
    """A model's portable program, its file, and what the file holds."""

    def __init__(self, model: nn.Module, inputs: Any, path: Path, **options: Any) -> None:
        result = run_pipeline(import_torch(model.eval(), inputs), PORTABLE)
        self.report = Report(result.decisions)
        (self.program,) = result.programs
        self.path = path
        self.summary = self.export(path, **options)
        self.model = onnx.load(path)

    def export(self, path: Path, **options: Any) -> OnnxSummary:
        return export(self.program, self.report, path, **options)

    def run(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return run(self.path, *inputs)

    def nodes(self, domain: str) -> list[Any]:
        return [node for node in self.model.graph.node if node.domain == domain]


def run(path: Path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {v.name: t.numpy() for v, t in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feeds)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def words(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.rand(batch, length) > 0.3
    mask[:, 0] = True
    return torch.randint(0, 50, (batch, length)), mask


@pytest.fixture(scope="module", params=[False, True], ids=["ours", "standard"])
def block(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("onnx") / "block.onnx"
    return Exported(Block(), words(2, 9), path, standard=request.param)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("onnx") / "block.onnx"
    return Exported(Block(), words(2, 9), path)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 16), (1, 17), (2, 40), (5, 3), (16, 1)])
def test_every_batch_and_length_is_right(block: Exported, shape: tuple[int, int]) -> None:
    inputs = words(*shape)
    expected = block.program.run(*inputs)
    for found, name in zip(block.run(*inputs), expected, strict=True):
        assert error(found, expected[name]) <= TOLERANCE


def test_the_checker_and_the_reference_evaluator_agree(block: Exported) -> None:
    from onnx.reference import ReferenceEvaluator

    onnx.checker.check_model(block.path, full_check=True)
    onnx.shape_inference.infer_shapes(block.model, check_type=True, strict_mode=True)
    ids, mask = words(3, 7)
    found = ReferenceEvaluator(str(block.path)).run(
        None, {"ids": ids.numpy(), "mask": mask.numpy()}
    )
    expected = block.program.run(ids, mask)
    assert error(torch.from_numpy(found[0]), expected["hidden"]) <= TOLERANCE


def test_inputs_outputs_and_dimensions_have_names(block: Exported) -> None:
    graph = block.model.graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "ids": ["batch", "sequence"],
        "mask": ["batch", "sequence"],
        "hidden": ["batch", "sequence", 24],
        "first": ["batch", 24],
    }
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names) and all(names)


def test_standard_has_standard_operators_only(tmp_path: Path) -> None:
    exported = Exported(Block(), words(2, 9), tmp_path / "block.onnx", standard=True)
    assert exported.nodes("sparsify") == [] and not exported.model.functions
    assert {opset.domain for opset in exported.model.opset_import} == {""}
    left = {node.op_type for node in exported.model.graph.node}
    assert not left & {"ScatterElements", "BitShift", "Identity", "Constant"}
    weights = {w.name for w in exported.model.graph.initializer if list(w.dims) == [24, 40]}
    assert len(weights) == 1  # transposed once, when it was written


def test_functions_are_shared_and_nodes_are_named_after_modules(ours: Exported) -> None:
    kinds = {node.op_type for node in ours.nodes("sparsify")}
    assert sorted(function.name for function in ours.model.functions) == sorted(kinds)
    assert {node.name for node in ours.nodes("sparsify")} >= {"norm", "out", "up", "down"}
    assert ours.model.ir_version == 8
    assert [(o.domain, o.version) for o in ours.model.opset_import] == [("", 18), ("sparsify", 1)]


def test_nodes_show_what_was_decided(ours: Exported) -> None:
    node = next(node for node in ours.nodes("sparsify") if node.name == "down")
    shown = {entry.key.removeprefix("sparsify."): entry.value for entry in node.metadata_props}
    stored = ours.summary.weights["down"]
    assert shown["storage"] == "bitmap of float32" == f"{stored.storage} of {stored.value_type}"
    assert int(shown["nnz"]) == int((Block().down.weight != 0).sum())
    assert float(shown["density"]) == pytest.approx(stored.density, abs=1e-4)
    assert int(shown["bytes"]) == stored.nbytes < int(shown["dense_bytes"]) == 4 * 24 * 40
    assert (shown["verdict"], shown["layout"]) == ("sparse", "csr")
    assert "nonzero" in shown["reason"] and shown["decided_by"] == "sparse_linear"
    text = ours.path.read_bytes()
    assert os.getcwd().encode() not in text and b"pkg.torch" not in text


def test_weights_are_stored_sparse_and_only_once(ours: Exported) -> None:
    in_file = {w.name: w.ByteSize() for w in ours.model.graph.initializer if ":" in w.name}
    assert sum(in_file.values()) < ours.summary.weight_bytes * 1.6
    assert not any(w.name.endswith(".weight") and "embedding" not in w.name and len(w.dims) == 2
                   for w in ours.model.graph.initializer)  # fmt: skip


class Tied(nn.Module):
    """One sparse layer twice, and an embedding that is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(30, 40), nn.Linear(40, 40)
        self.head = nn.Linear(40, 30, bias=False)
        self.head.weight = self.embedding.weight
        with torch.no_grad():
            self.layer.weight *= torch.rand_like(self.layer.weight) > 0.8
            for weight in self.parameters():
                weight.copy_(weight.bfloat16())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.layer(self.embedding(ids))))


def test_shared_weights_are_stored_once_and_bfloat16_as_such(tmp_path: Path) -> None:
    exported = Exported(Tied(), (torch.randint(0, 30, (2, 7)),), tmp_path / "tied.onnx")
    kinds = {w.name: w.data_type for w in exported.model.graph.initializer if len(w.dims) <= 2}
    assert kinds["layer.weight:bitmap.values"] == onnx.TensorProto.BFLOAT16
    matrices = [w for w in exported.model.graph.initializer if sorted(w.dims) == [30, 40]]
    assert [w.data_type for w in matrices] == [onnx.TensorProto.FLOAT]  # read by both
    names = [node.name for node in exported.nodes("sparsify")]
    assert names[:2] == ["layer", "layer_1"] and set(exported.summary.weights) == {
        "layer",
        exported.nodes("sparsify")[-1].name,
    }
    ids = torch.randint(0, 30, (3, 5))
    assert error(exported.run(ids)[0], exported.program.run(ids)) <= TOLERANCE
    onnx.checker.check_model(exported.path, full_check=True)


def test_a_conv_net_exports(tmp_path: Path) -> None:
    exported = Exported(Pictures(), (torch.rand(2, 3, 32, 32),), tmp_path / "pictures.onnx")
    onnx.checker.check_model(exported.path, full_check=True)
    for shape in [(1, 3, 32, 32), (3, 3, 32, 32)]:
        image = torch.randn(shape)
        (found,) = exported.run(image)
        assert error(found, exported.program.run(image)) <= TOLERANCE
    assert [node.name for node in exported.nodes("sparsify")] == ["head"]


class Spectra(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(x) + torch.linalg.eigvalsh(x @ x.T)


def test_operators_that_onnx_lacks_are_all_named(tmp_path: Path) -> None:
    says = r"_linalg_eigh.*_linalg_svd.*replace them in the model"
    with pytest.raises(ValueError, match=says):
        Exported(Spectra(), (torch.randn(5, 5),), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "raised", "says"),
    [
        ("missing/model.onnx", FileNotFoundError, "missing: no such folder"),
        (".", IsADirectoryError, "is a folder"),
    ],
)
def test_a_place_that_cannot_be_written(
    ours: Exported, tmp_path: Path, place: str, raised: type[Exception], says: str
) -> None:
    with pytest.raises(raised, match=says):
        ours.export(tmp_path / place)


def test_a_failed_write_leaves_the_old_file(
    ours: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnxscript.ir.save", full)
    with pytest.raises(OSError, match="No space"):
        ours.export(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_large_models_have_their_weights_beside_them(
    ours: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsify.codegen.emit.onnx.files._LARGEST", 1000)
    path = tmp_path / "large.onnx"
    summary = ours.export(path)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["large.onnx", "large.onnx.data"]
    assert summary.nbytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    onnx.checker.check_model(path, full_check=True)
    inputs = words(2, 5)
    assert error(run(path, *inputs)[0], ours.program.run(*inputs)["hidden"]) <= TOLERANCE


def test_a_compiled_model_shows_the_decisions_for_its_target(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 8)).eval()
    with torch.no_grad():
        model[0].weight *= torch.rand_like(model[0].weight) > 0.9
    compiled = sparsify.compile(model, (torch.randn(32, 48),), num_threads=1)
    compiled.export_onnx(tmp_path / "model.onnx")
    node = onnx.load(tmp_path / "model.onnx").graph.node[0]
    shown = {entry.key.removeprefix("sparsify."): entry.value for entry in node.metadata_props}
    assert (node.op_type, shown["target"]) == ("LinearBitmapBiasTanh", compiled.report.target)
    decision = next(d for d in compiled.report.final() if d.site == "0")
    assert (shown["verdict"], shown["layout"]) == (decision.verdict, decision.layout)
    x = torch.randn(5, 48)
    assert error(run(tmp_path / "model.onnx", x)[0], compiled(x)) <= TOLERANCE
    with pytest.raises(ValueError, match="no entry 'decode', it has forward"):
        compiled.export_onnx(tmp_path / "model.onnx", entry="decode")


def fraction(density: float) -> Callable[[int, int], torch.Tensor]:
    """Matrices of exactly so many nonzeros."""

    def matrix(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows * columns)
        values[torch.randperm(len(values))[round(density * len(values)) :]] = 0
        return values.view(rows, columns)

    return matrix


@pytest.mark.parametrize(
    ("density", "columns", "storage", "bytes_a_weight"),
    [
        (1.0, 300, "dense", 4.0),
        (0.2, 300, "bitmap", 0.125 + 0.2 * 4),
        (0.02, 300, "csr", 0.02 * 6),
        (0.03, 200, "csr", 0.03 * 5 + 0.02),
    ],
)
def test_the_smallest_form_is_chosen(
    density: float, columns: int, storage: str, bytes_a_weight: float
) -> None:
    weight = fraction(density)(200, columns)
    (stored,) = smallest(weight)
    assert stored.storage == storage and stored.nnz == int(torch.count_nonzero(weight))
    assert stored.nbytes == pytest.approx(bytes_a_weight * weight.numel(), rel=0.15)
    assert smallest(weight.bfloat16().float())[0].nbytes < stored.nbytes


def test_several_matrices_share_the_form_that_is_smallest_in_all() -> None:
    few, many = fraction(0.02)(40, 300), fraction(0.3)(400, 300)
    assert [w.storage for w in smallest(few, many)] == ["bitmap", "bitmap"]
    assert [w.nnz for w in smallest(few, many)] == [int((w != 0).sum()) for w in (few, many)]


def test_a_matrix_of_zeros_is_stored() -> None:
    assert smallest(torch.zeros(3, 5))[0].nnz == 0
