"""Damaged and hostile files: a clear error, or a program; never a crash, never much memory."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sparsify.frontend.onnx.capture import capture_onnx

MOST_MEMORY = 2**30
"""Bytes that an import of a small file may add to the process."""


def proto() -> onnx.ModelProto:
    """Two layers with weights of three types."""
    rng = np.random.default_rng(0)
    stored = {
        "w": rng.standard_normal((8, 4), np.float32),
        "b": rng.standard_normal(8, np.float32),
        "shape": np.array([-1, 2, 4]),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Reshape", ["r", "shape"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


WHOLE = proto().SerializeToString()


def outcome(data: bytes, folder: Path) -> Exception | None:
    """What importing these bytes raises; only errors for a user to read may be raised."""
    path = folder / "damaged.onnx"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = None
    try:
        capture_onnx(path)
    except (ValueError, TypeError, FileNotFoundError) as raised:
        error = raised
        assert str(raised).startswith(str(path))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MOST_MEMORY
    return error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def test_the_whole_file_is_fine(folder: Path) -> None:
    assert outcome(WHOLE, folder) is None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(length=st.integers(0, len(WHOLE) - 1))
def test_a_file_that_is_cut_off(folder: Path, length: int) -> None:
    outcome(WHOLE[:length], folder)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4))
def test_a_file_with_other_bytes(folder: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for place, byte in changes:
        data[place] = byte
    outcome(bytes(data), folder)


def changed(change: str) -> bytes:
    """The model with one thing wrong."""
    model = proto()
    graph = model.graph
    weight = graph.initializer[0]
    if change == "a size of 2^40":
        weight.dims[0] = 2**40
    elif change == "a negative size":
        weight.dims[0] = -1
    elif change == "data of another type":
        weight.data_type = TensorProto.DOUBLE
    elif change == "an unknown type":
        weight.data_type = 99
    elif change == "a result of 2^40 elements":
        graph.initializer[2].CopyFrom(numpy_helper.from_array(np.array([2**20, 2**20]), "shape"))
        graph.node[2].CopyFrom(helper.make_node("ConstantOfShape", ["shape"], ["y"]))
    elif change == "an expansion to 2^40 elements":
        graph.initializer[2].CopyFrom(numpy_helper.from_array(np.array([2**40, 1, 8]), "shape"))
        graph.node[2].CopyFrom(helper.make_node("Expand", ["r", "shape"], ["y"]))
    elif change == "a loop without end":
        body = helper.make_graph(
            [
                helper.make_node("Identity", ["c"], ["again"]),
                helper.make_node("Relu", ["v"], ["o"]),
            ],
            "body",
            [helper.make_tensor_value_info(n, t, None) for n, t in (("i", 7), ("c", 9), ("v", 1))],
            [helper.make_tensor_value_info(n, t, None) for n, t in (("again", 9), ("o", 1))],
        )
        graph.node[2].CopyFrom(helper.make_node("Loop", ["", "", "r"], ["y"], body=body))
    elif change == "a name computed twice":
        graph.node[1].output[0] = "h"
    elif change == "an input that nobody computes":
        graph.node[1].input[0] = "nothing"
    elif change == "a cycle":
        graph.node[0].input[0] = "r"
    elif change in ("a function that calls itself", "a function of too many inputs"):
        inner = ["Relu", "relu"][change.endswith("itself")]
        call = helper.make_node(inner, ["a"], ["c"], domain="own" if inner == "relu" else "")
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
        model.functions.append(helper.make_function("own", "relu", ["a"], ["c"], [call], imports))
        model.opset_import.append(imports[1])
        inputs = ["h"] if inner == "relu" else ["h", "w"]
        graph.node[1].CopyFrom(helper.make_node("relu", inputs, ["r"], domain="own"))
    elif change == "a missing file of weights":
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="nowhere.bin")
    elif change == "weights outside the folder":
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="../../../../etc/hostname")
    elif change == "too few weights":
        weight.raw_data = weight.raw_data[:-3]
    return model.SerializeToString()


WRONG = [
    "a size of 2^40",
    "a negative size",
    "data of another type",
    "an unknown type",
    "an expansion to 2^40 elements",
    "a loop without end",
    "an input that nobody computes",
    "a cycle",
    "a function that calls itself",
    "a function of too many inputs",
    "a missing file of weights",
    "weights outside the folder",
    "too few weights",
]


@pytest.mark.parametrize("change", WRONG)
def test_one_wrong_thing_is_told(folder: Path, change: str) -> None:
    assert outcome(changed(change), folder) is not None


HEADER = """<ir_version: 9, opset_import: ["" : 17, "own": 1]>
    g (float[N, 4] x) => (float[N, 4] y) { y = own.f0(x) }
"""


def function(body: str, name: str = "f0", version: int = 17) -> str:
    return (
        f'<domain: "own", opset_import: ["" : {version}, "own": 1]> {name} (a) => (b) {{ {body} }}'
    )


CALLS = {
    "itself": ([function("b = own.f0(a)")], "calls itself"),
    "itself at another version": ([function("b = own.f0(a)", version=13)], "calls itself"),
    "each other": (
        [function("b = own.f1(a)"), function("b = own.f0(a)", "f1")],
        "calls itself",
    ),
    "each next one twice": (
        [
            *(function(f"c = own.f{i + 1}(a) b = own.f{i + 1}(c)", f"f{i}") for i in range(30)),
            function("b = Relu(a)", "f30"),
        ],
        "1.1e\\+09 nodes",
    ),
    "with more inputs than it has": ([function("b = Relu(a)")], "cannot be inlined"),
    "of two": ([function("b = Relu(a)")] * 2, "multiple local functions"),
}


@pytest.mark.parametrize("calls", CALLS)
def test_wrong_functions_are_told(folder: Path, calls: str) -> None:
    functions, told = CALLS[calls]
    model = onnx.parser.parse_model(HEADER + "\n".join(functions))
    if calls == "with more inputs than it has":
        model.graph.node[0].input.append("x")
    error = outcome(model.SerializeToString(), folder)
    assert error is not None and re.search(told, str(error))


def test_a_declared_type_without_a_pytorch_type_is_no_crash(folder: Path) -> None:
    model = proto()
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.STRING
    assert outcome(model.SerializeToString(), folder) is None


def test_empty_tensors_are_served(folder: Path) -> None:
    model = proto()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((0, 4), np.float32), "w"))
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.zeros(0, np.float32), "b"))
    model.graph.node[2].CopyFrom(helper.make_node("Identity", ["r"], ["y"]))
    outcome(model.SerializeToString(), folder)
