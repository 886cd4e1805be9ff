"""sparsify export: what it writes, what it refuses."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from sparsify.cli.models import load_model, quiet


def test_c_for_a_board(cli, tiny: str, tmp_path: Path) -> None:
    output = tmp_path / "board"
    done = cli("export", tiny, "--c", "--target", "raspberry-pi/4b", "--name", "tiny", "-o", output,
               "--batch", 1, "--seq", 24)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert {"tiny.h", "tiny.c", "tiny_kernels.o", "tiny.weights", "CMakeLists.txt", "main.c"} <= {
        path.name for path in output.iterdir()
    }
    header = (output / "tiny.h").read_text()
    assert "for raspberry-pi/4b" in header and ": 1 to 24" in header


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "x"), "say what to write: --onnx or --c"),
        (("--c", "-o", "x", "--largest", "x=8"), "largest['x'] (8,) needs 3 sizes"),
        (("--c", "-o", "x", "--largest", "x:8"), "write it as INPUT=SHAPE, such as x=1x128"),
        (("--c", "-o", "x", "--initial", "h"), "write it as INPUT=VALUE, h=0.5 or h=first.npy"),
        (("--c", "-o", "x", "--initial", "x=1"), "initial names x, but the state of the model is"),
        (("--c", "-o", "x", "--initial", "x=none.npy"), "none.npy: No such file or directory"),
        (("--c", "-o", "x", "--standard"), "--standard applies to --onnx only"),
        (("--onnx", "-o", "x", "--target", "native"), "--target applies to --c only"),
        (("--c", "-o", "x", "--target", "z80"), "unknown target 'z80'; targets: native"),
    ],
)
def test_refusals(cli, tiny: str, arguments: tuple[str, ...], message: str) -> None:
    done = cli("export", tiny, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_file_is_no_folder(cli, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = cli("export", tiny, "--c", "-o", tmp_path / "file")
    assert done.exit_code == 2
    assert "is a file; name a folder" in done.stderr


def test_onnx_for_any_onnx_runtime(cli, tiny: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    output = tmp_path / "tiny.onnx"
    done = cli("export", tiny, "--onnx", "-o", output)
    assert done.exit_code == 0, done.output
    assert f"{output}: " in done.stdout
    assert "weights of linears: 1 bitmap of float32, 1 dense of float32" in done.stdout
    model = onnx.load(output)
    assert [node.name for node in model.graph.node if node.domain == "sparsify"] == [
        "up",
        "down",
        "norm",
    ]


def test_an_onnx_file_is_optimised(cli, tiny: str, tmp_path: Path) -> None:
    """Written by torch for the dense model, rewritten, and the same numbers."""
    onnxruntime = pytest.importorskip("onnxruntime")
    output, dense = tmp_path / "out.onnx", tmp_path / "dense.onnx"
    loaded = load_model(tiny)
    with quiet():
        torch.onnx.export(
            loaded.module, loaded.inputs, dense, dynamo=True, opset_version=18, verbose=False
        )
    done = cli("optimize", dense, "-o", output, "--json")
    assert done.exit_code == 0, done.output
    nodes = json.loads(done.stdout)["nodes"]
    assert {"sparsify.LinearBitmapBiasGelu", "sparsify.LayerNorm"} <= nodes.keys()
    found, expected = (
        onnxruntime.InferenceSession(path).run(None, {"x": loaded.inputs[0].numpy()})[0]
        for path in (output, dense)
    )
    assert abs(found - expected).max() <= 1e-5 * abs(expected).max()


NAMED = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,8] x, float[N,6] class) => (float[N,6] y, float[N,6] z)
{ t = Transpose <perm = [1, 0]> (w) h = MatMul(x, t) a = Add(h, b) z = Relu(a) y = Add(z, class) }
"""


def test_an_onnx_file_keeps_its_names(cli, tmp_path: Path) -> None:
    """Those of inputs, outputs and weights, also out of a file that holds packed weights."""
    onnx = pytest.importorskip("onnx")
    model = onnx.parser.parse_model(NAMED)
    names = {"x": "in.0", "y": "out/0", "w": "encoder.0.weight", "b": "encoder.0.bias"}
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    weight = torch.randn(6, 8) * (torch.rand(6, 8) < 0.3)
    for name, tensor in ((names["w"], weight), (names["b"], torch.randn(6))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(tensor.numpy(), name))
    files = [tmp_path / f"{number}.onnx" for number in range(3)]
    onnx.save(model, files[0])
    for source, written in itertools.pairwise(files):
        done = cli("optimize", source, "-o", written)
        assert done.exit_code == 0, done.output
        graph = onnx.load(written).graph
        assert [value.name for value in graph.input] == ["in.0", "class"]
        assert [value.name for value in graph.output] == ["out/0", "z"]
        stored = {tensor.name.partition(":")[0] for tensor in graph.initializer}
        assert stored == {names["w"], names["b"]}
        assert "encoder.0" in {node.name for node in graph.node}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model.pt2", "-o", "x"), "is no .onnx file; other models go through 'sparsify export'"),
        (("model.onnx", "-o", "x"), "model.onnx"),
        (("model.onnx", "-o", "x", "--passes", "partition"), "partition: binds a program"),
        (("model.onnx", "-o", "x", "--passes", "no_such"), "unknown pass 'no_such'"),
        (("model.onnx", "-o", "x", "--verify", "all"), "must be shapes or numeric"),
    ],
)
def test_what_optimize_refuses(cli, arguments: tuple[str, ...], message: str) -> None:
    done = cli("optimize", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
