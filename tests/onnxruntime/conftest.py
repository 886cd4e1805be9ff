"""The library, built once, and models of one operator with any operands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify import onnxruntime as ours
from sparsify.ops.onnx import DOMAIN, ONNX_OPERATORS, OPSET, VERSION
from tests.ops.domain import all_cases
from tests.ops.domain.case import Case


@pytest.fixture(scope="session")
def library() -> Path:
    """For this machine; in the cache that the sessions of these tests use too."""
    pytest.importorskip("onnxruntime")
    return ours.library()


@pytest.fixture(scope="session")
def domain() -> list[Case]:
    """The cases of every operator of the domain, with what eager PyTorch makes of them."""
    return all_cases()


@pytest.fixture(scope="session")
def model() -> Callable[..., bytes]:
    """``model(operator, inputs, attributes, rank)``: a file of one node.

    Tensors of constant ports become initializers unless ``constant=False``.
    """
    onnx = pytest.importorskip("onnx")

    def build(
        name: str,
        inputs: dict[str, torch.Tensor],
        attributes: dict[str, Any],
        rank: int,
        constant: bool = True,
    ) -> bytes:
        helper, operator = onnx.helper, ONNX_OPERATORS[name]

        def kind(array: np.ndarray) -> int:
            return int(helper.np_dtype_to_tensor_dtype(array.dtype))

        fixed = {p.name for p in operator.inputs if p.constant and constant}
        arrays = {port.name: inputs[port.name].numpy() for port in operator.inputs}
        node = helper.make_node(name, list(arrays), ["y"], domain=DOMAIN, **attributes)
        graph = helper.make_graph(
            [node],
            "one",
            [
                helper.make_tensor_value_info(n, kind(a), [None] * a.ndim)
                for n, a in arrays.items()
                if n not in fixed
            ],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * rank)],
            [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items() if n in fixed],
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
        functions = [operator.function()]
        made = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8)
        return bytes(made.SerializeToString())

    return build


@pytest.fixture(scope="session")
def session(library: Path) -> Callable[..., Any]:
    """``session(model bytes, threads)`` with the library."""
    import onnxruntime

    def open_(model: bytes, threads: int = 1) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.register_custom_ops_library(str(library))
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    return open_
