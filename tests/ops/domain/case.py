"""One call of an operator of the domain, as a model of one node."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparsify.ops import OPERATORS
from sparsify.ops.onnx import DOMAIN, OPSET, VERSION, OnnxOperator

TOKENS = [(1, 1), (3, 5), (2, 17)]
OUT, IN = 7, 19
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 3


@dataclass(frozen=True)
class Case:
    """One call: inputs by port, attributes, and what each output must be."""

    operator: OnnxOperator
    inputs: dict[str, torch.Tensor]
    attributes: dict[str, Any]
    expected: tuple[torch.Tensor, ...]


def call(name: str, *args: Any) -> torch.Tensor:
    result: torch.Tensor = OPERATORS[name].overload(*args)
    return result


def of(operator: OnnxOperator, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {port.name: inputs[port.name] for port in operator.inputs}


def model_of(case: Case) -> Any:
    """A model of the one node, constant ports as initializers."""
    import onnx

    helper = onnx.helper

    def info(name: str, tensor: torch.Tensor) -> Any:
        kind = helper.np_dtype_to_tensor_dtype(tensor.numpy().dtype)
        return helper.make_tensor_value_info(name, kind, [None] * tensor.dim())

    ports = {port.name: port for port in case.operator.inputs}
    node = helper.make_node(
        case.operator.name,
        list(ports),
        [port.name for port in case.operator.outputs],
        domain=DOMAIN,
        **case.attributes,
    )
    constants = {n: t for n, t in case.inputs.items() if ports[n].constant}
    graph = helper.make_graph(
        [node],
        "one",
        [info(n, t) for n, t in case.inputs.items() if n not in constants],
        [info(p.name, t) for p, t in zip(case.operator.outputs, case.expected, strict=True)],
        [onnx.numpy_helper.from_array(t.numpy(), n) for n, t in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    functions = [case.operator.function()]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8)


def feeds_of(case: Case, model: Any) -> dict[str, np.ndarray]:
    return {value.name: case.inputs[value.name].numpy() for value in model.graph.input}


def compare(found: list[np.ndarray], case: Case) -> None:
    for array, expected in zip(found, case.expected, strict=True):
        torch.testing.assert_close(
            torch.from_numpy(array), expected, atol=1e-5, rtol=1e-5, equal_nan=True
        )
