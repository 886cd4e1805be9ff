"""ONNX files: weights in every place they may lie in, and every way to be damaged."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from sparsify.frontend.onnx.capture import capture_onnx
from sparsify.frontend.onnx.file import read_onnx

WEIGHT = np.array([[1, 0, 2], [0, 0, 3]], np.float32)


def model(nodes, inputs=("N", 3), domain_versions=(("", 17),), **stored) -> onnx.ModelProto:
    """``y`` from ``x`` and ``w``."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        **stored,
    )
    opsets = [helper.make_opsetid(*entry) for entry in domain_versions]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def sparse(indices: np.ndarray) -> onnx.SparseTensorProto:
    values = numpy_helper.from_array(np.array([1, 2, 3], np.float32), "w")
    return helper.make_sparse_tensor(values, numpy_helper.from_array(indices, "i"), [2, 3])


def run(proto: onnx.ModelProto, folder: Path, x: torch.Tensor) -> torch.Tensor:
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return capture_onnx(path).module()(x)["y"]


@pytest.mark.parametrize("indices", [[0, 2, 5], [[0, 0], [0, 2], [1, 2]], [[1, 2], [0, 2], [0, 0]]])
def test_sparse_initializers(tmp_path: Path, indices: list) -> None:
    indices = np.array(indices, np.int64)
    proto = model(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        sparse_initializer=[sparse(indices)],
    )
    expected = WEIGHT.copy()
    if indices.ndim == 2 and indices[0, 0]:
        expected[0, 0], expected[1, 2] = 3, 1
    x = torch.randn(4, 3)
    torch.testing.assert_close(run(proto, tmp_path, x), x @ torch.from_numpy(expected).t())


def test_the_sparse_product_that_onnx_runtime_rejects(tmp_path: Path) -> None:
    """onnxruntime issue 31730: it takes the sparse initializer for a dense one."""
    proto = model(
        [helper.make_node("SparseToDenseMatMul", ["w", "x"], ["y"], domain="com.microsoft")],
        inputs=(3, "N"),
        domain_versions=(("", 17), ("com.microsoft", 1)),
        sparse_initializer=[sparse(np.array([[0, 0], [0, 2], [1, 2]]))],
    )
    x = torch.randn(3, 5)
    torch.testing.assert_close(run(proto, tmp_path, x), torch.from_numpy(WEIGHT) @ x)


def test_sparse_initializers_of_a_branch(tmp_path: Path) -> None:
    """They lie in the graph of the branch."""
    value = helper.make_tensor_value_info("v", TensorProto.FLOAT, None)
    gemm = helper.make_node("Gemm", ["x", "w"], ["v"], transB=1)
    stored = [sparse(np.array([0, 2, 5]))]
    taken = helper.make_graph([gemm], "a", [], [value], sparse_initializer=stored)
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["v"])], "b", [], [value])
    branch = helper.make_node("If", ["c"], ["y"], then_branch=taken, else_branch=other)
    condition = numpy_helper.from_array(np.array(True), "c")
    x = torch.randn(4, 3)
    found = run(model([branch], initializer=[condition]), tmp_path, x)
    torch.testing.assert_close(found, x @ torch.from_numpy(WEIGHT).t())


@pytest.mark.parametrize("indices", [[0, 2, 6], [0, 2, -1], [0, 2], [[0, 0], [0, 2], [2, 0]]])
def test_wrong_sparse_initializers(tmp_path: Path, indices: list) -> None:
    proto = model(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        sparse_initializer=[sparse(np.array(indices, np.int64))],
    )
    with pytest.raises(ValueError, match=r"sparse initializer 'w' of shape \[2, 3\]"):
        run(proto, tmp_path, torch.ones(1, 3))


def test_a_sparse_initializer_that_no_memory_holds(tmp_path: Path) -> None:
    huge = sparse(np.array([0, 2, 5]))
    huge.dims[:] = [2**40, 2**40]
    proto = model([helper.make_node("Gemm", ["x", "w"], ["y"])], sparse_initializer=[huge])
    with pytest.raises(ValueError, match="larger than 8 GiB"):
        run(proto, tmp_path, torch.ones(1, 3))


def test_weights_in_constant_nodes(tmp_path: Path) -> None:
    value = numpy_helper.from_array(WEIGHT.T.copy(), "w")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=value),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    path = tmp_path / "model.onnx"
    onnx.save(model(nodes), path)
    exported = capture_onnx(path)
    assert [tuple(w.shape) for w in exported.state_dict.values()] == [(2, 3)]
    x = torch.randn(4, 3)
    torch.testing.assert_close(exported.module()(x)["y"], x @ torch.from_numpy(WEIGHT).t())


def external(folder: Path, location: str = "weights.bin") -> Path:
    proto = model(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        initializer=[numpy_helper.from_array(WEIGHT, "w")],
    )
    path = folder / "model.onnx"
    onnx.save_model(
        proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    if location != "weights.bin":
        proto = onnx.load(path, load_external_data=False)
        entries = proto.graph.initializer[0].external_data
        next(e for e in entries if e.key == "location").value = location
        path.write_bytes(proto.SerializeToString())
    return path


def test_weights_beside_the_file(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    found = capture_onnx(external(tmp_path)).module()(x)["y"]
    torch.testing.assert_close(found, x @ torch.from_numpy(WEIGHT).t())


def test_missing_and_short_weights_beside_the_file(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"'w' lies in 'weights.bin', which cannot be read"):
        read_onnx(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"'w' lies in 'weights.bin', which is not there"):
        read_onnx(path)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "a/../../weights.bin"])
def test_nothing_outside_the_folder_is_read(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    path = external(folder, location)
    with pytest.raises(ValueError, match="outside the model's folder"):
        read_onnx(path)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    path = external(folder)
    (folder / "weights.bin").rename(tmp_path / "weights.bin")
    (folder / "weights.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        read_onnx(path)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_a_file_that_is_cut_off(tmp_path: Path, share: float) -> None:
    path = tmp_path / "model.onnx"
    proto = model(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        initializer=[numpy_helper.from_array(WEIGHT, "w")],
    )
    whole = proto.SerializeToString()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"model.onnx: "):
        capture_onnx(path)


def test_no_file_and_too_large_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_onnx(path)
    with path.open("wb") as file:
        file.truncate(3 * 2**30)  # takes no space on the disk
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"3.0 GiB; protobuf ends at 2 GiB.*external"):
        read_onnx(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20, "it was read before it was refused"


@pytest.mark.parametrize(("version", "fix"), [(6, "version_converter"), (99, "newer onnx")])
def test_versions_that_are_not_read(tmp_path: Path, version: int, fix: str) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(
        model([helper.make_node("Relu", ["x"], ["y"])], domain_versions=[("", version)]), path
    )
    with pytest.raises(ValueError, match=rf"\(opset\) {version}; 7 to .*{fix}"):
        read_onnx(path)


def test_inputs_that_are_no_tensors(tmp_path: Path) -> None:
    proto = model([helper.make_node("Relu", ["x"], ["y"])])
    path = tmp_path / "model.onnx"
    proto.graph.input[0].CopyFrom(
        helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None)
    )
    onnx.save(proto, path)
    with pytest.raises(ValueError, match="input 'x' is a sequence_type"):
        read_onnx(path)
    proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, None))
    onnx.save(proto, path)
    with pytest.raises(ValueError, match="input 'x' declares no shape"):
        read_onnx(path)
    assert read_onnx(path, shapes={"x": ("N", 2)}).inputs[0].dims == ("N", 2)
