"""ONNX files on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import parser

import sparsify
from sparsify.cli.models import load_model

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,L,32] x, float[8] scale) => (float[N,L,8] y)
{ m = MatMul(x, w) s = Add(m, b) r = Relu(s) y = Mul(r, scale) }"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    model = parser.parse_model(TEXT)
    for name, shape in (("w", (32, 8)), ("b", (8,))):
        stored = onnx.numpy_helper.from_array(torch.randn(shape).numpy(), name)
        model.graph.initializer.append(stored)
    file = tmp_path / "tiny.onnx"
    onnx.save(model, file)
    return str(file)


def test_sizes_of_the_examples_and_of_the_model(path: str) -> None:
    loaded = load_model(path, batch=3, seq=7)
    assert [tuple(x.shape) for x in loaded.inputs[0]] == [(3, 7, 32), (8,)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shape", "x=1x5x32"), "neither a number"),
        (("--constant", "scale=[1.5, 2]"), "it is declared as [8]"),
        (("--shape", "x=4,5,32", "--batch", "3"), "a batch of 3 was asked for"),
        (("--shape", "x=4,5,32", "--seq", "7"), "a sequence of 7 was asked for"),
    ],
)
def test_sizes_that_the_file_does_not_have_are_refused(
    options: tuple[str, ...], message: str, path: str, cli, tmp_path: Path
) -> None:
    done = cli("compile", path, "-o", tmp_path / "tiny.sparsify", *options)
    assert done.exit_code == 2
    assert message in done.output


def test_every_unsupported_operator_is_listed(cli, tmp_path: Path) -> None:
    lines = "\n".join(f"y{i} = Unheard{i}(y{i - 1})" for i in range(1, 21))
    text = TEXT[: TEXT.index("g (")] + f"g (float[N] y0) => (float[N] y20) {{ {lines} }}"
    path = tmp_path / "unheard.onnx"
    onnx.save(parser.parse_model(text), path)
    done = cli("compile", path, "-o", tmp_path / "unheard.sparsify")
    assert done.exit_code == 2
    assert all(f"::Unheard{i} " in done.output for i in range(1, 21))


def test_compile_with_a_shape_and_a_constant(path: str, cli, tmp_path: Path) -> None:
    output = tmp_path / "tiny.sparsify"
    ones = f"scale={[1.0] * 8}"
    done = cli("compile", path, "-o", output, "--shape", "x=?,5,32", "--constant", ones, "--json")
    assert done.exit_code == 0, done.output
    sites = {decision["site"] for decision in json.loads(done.stdout)["decisions"]}
    assert "w" in sites
    compiled = sparsify.load(output)
    assert compiled(torch.randn(2, 5, 32))["y"].shape == (2, 5, 8)
    with pytest.raises(ValueError, match="dim 1 is 6"):
        compiled(torch.randn(2, 6, 32))


def test_peers_are_timed_on_the_file_itself(path: str, cli) -> None:
    done = cli(
        *("benchmark", path, "--against", "onnxruntime", "--rounds", "2", "--seconds", "0.01"),
        *("--constant", f"scale={[2.0] * 8}", "--batch", "3", "--json"),
    )
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)["candidates"]["onnxruntime"]
    assert row["agrees"] and row["file_bytes"] == Path(path).stat().st_size
    assert [entry.name for entry in Path(path).parent.iterdir()] == [Path(path).name]


def test_prune_an_onnx_file(path: str, cli, tmp_path: Path) -> None:
    output = tmp_path / "pruned.pt2"
    done = cli("prune", path, "-o", output, "--sparsity", "0.5")
    assert done.exit_code == 0, done.output
    weight = load_model(str(output)).model.state_dict["w"]
    assert weight.shape == (8, 32) and int((weight == 0).sum()) == 128


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--shape", "x"), "write NAME=SIZES"),
        (("--shape", "z=1,2"), "has no input 'z'"),
        (("--constant", "scale=word"), "write NAME=VALUE"),
    ],
)
def test_wrong_options(path: str, cli, option: tuple[str, str], message: str) -> None:
    done = cli("compile", path, *option)
    assert done.exit_code != 0 and message in " ".join(done.output.split())


def test_options_for_other_models_are_refused(tiny: str, cli) -> None:
    done = cli("compile", tiny, "--shape", "x=1,2")
    assert done.exit_code != 0 and "are for ONNX files" in " ".join(done.output.split())
