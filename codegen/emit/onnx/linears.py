"""Gives every linear of an ONNX graph, and the experts of mixtures, their weights in the smallest
form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparsify.codegen.emit.onnx.weights import StoredWeight, smallest
from sparsify.layouts import parse
from sparsify.ops import LINEARS, OPERATORS
from sparsify.ops.onnx import DOMAIN, ONNX_OPERATORS
from sparsify.ops.onnx.linear import WEIGHTS, Storage
from sparsify.ops.onnx.schema import camel

if TYPE_CHECKING:
    from onnxscript import ir


_FAMILIES = frozenset(name for name, made in OPERATORS.items() if made.overload in LINEARS)

_EXPERTS = slice(3, 5)
"""The inputs of experts that are weights, as translated: up's and down's."""


def store_weights(
    model: ir.Model, *, dense: bool = False
) -> dict[ir.Node, dict[str, StoredWeight]]:
    """Replaces the weights of all linears and experts; nodes that share weights share tensors.

    Args:
        model: as translated, its linears with csr weights as PyTorch holds them, or dense ones; its
            experts with dense ones.
        dense: store the matrices, in float32.

    Returns:
        What each of these nodes holds now, by the names of the weights' sites.
    """
    known: dict[tuple[ir.Value, ...], tuple[list[StoredWeight], list[ir.Value]]] = {}
    stored = {}
    for node in list(model.graph):
        operator = ONNX_OPERATORS.get(node.op_type) if node.domain == DOMAIN else None
        if operator is None or operator.family not in (*_FAMILIES, "experts"):
            continue
        if operator.family == "experts":
            place, each = _EXPERTS, 1
        else:
            each = len(WEIGHTS[_storage(node)])
            place = slice(1, 1 + each)
        values = tuple(node.inputs[place])
        parts = [values[i : i + each] for i in range(0, len(values), each)]
        if values not in known:
            weights = _all_stored(node, parts, dense)
            tensors = [
                tensor
                for weight, part in zip(weights, parts, strict=True)
                for tensor in _initializers(model, weight, part)
            ]
            known[values] = (weights, tensors)
        weights, tensors = known[values]
        names = [_site(part) for part in parts]
        new = _with_weights(node, place, weights[0].storage, tensors)
        stored[new] = dict(zip(names, weights, strict=True))
    return stored


def _site(part: tuple[ir.Value, ...]) -> str:
    return str(part[0].name).partition(":")[0].removesuffix(".weight")


def _storage(node: ir.Node) -> Storage:
    storage: Storage = node.attributes["storage"].as_string()
    return storage


def _all_stored(
    node: ir.Node, parts: list[tuple[ir.Value, ...]], dense: bool
) -> list[StoredWeight]:
    """The weights in one form."""
    matrices = [_matrix(node, part) for part in parts]
    weights = smallest(*matrices)
    shared = any(len(part[0].uses()) > 1 for part in parts)
    if dense or (weights[0].storage == "dense" and shared):
        # Whoever else reads the matrix, an embedding say, reads float32.
        return [
            StoredWeight("dense", {"weight": matrix}, weight.nnz, weight.shape)
            for matrix, weight in zip(matrices, weights, strict=True)
        ]
    return list(weights)


def _matrix(node: ir.Node, values: tuple[ir.Value, ...]) -> torch.Tensor:
    layout = parse(_storage(node))
    tensors: list[torch.Tensor] = [value.const_value.raw.detach() for value in values]
    if ONNX_OPERATORS[node.op_type].family == "experts":
        (stacked,) = tensors
        return stacked.reshape(-1, stacked.shape[-1])
    shape = (node.attributes["out_features"].as_int(), node.attributes["in_features"].as_int())
    return layout.unpack(dict(zip(layout.tensors, tensors, strict=True)), shape)


def _initializers(
    model: ir.Model, weight: StoredWeight, old: tuple[ir.Value, ...]
) -> list[ir.Value]:
    from onnxscript import ir

    if len(old) == 1 and (weight.storage, weight.value_type) == ("dense", "float32"):
        return list(old)
    name = old[0].name.partition(":")[0]
    made = []
    for port, tensor in weight.tensors.items():
        value = ir.Value(
            name=f"{name}:{weight.storage}.{port}",
            shape=ir.Shape(tensor.shape),
            type=ir.TensorType(ir.tensor(tensor).dtype),
            const_value=ir.tensor(tensor),
        )
        model.graph.register_initializer(value)
        made.append(value)
    return made


def _with_weights(
    node: ir.Node, place: slice, storage: Storage, tensors: list[ir.Value]
) -> ir.Node:
    """The node with other weights at a place among its inputs."""
    from onnxscript import ir

    kind = ONNX_OPERATORS[node.op_type.replace(camel(_storage(node)), camel(storage), 1)]
    new = ir.Node(
        node.domain,
        kind.name,
        [*node.inputs[: place.start], *tensors, *node.inputs[place.stop :]],
        {**node.attributes, "storage": ir.AttrString("storage", storage)},
        name=node.name,
    )
    new.outputs[0].shape, new.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], [new], node.outputs, new.outputs
    )
    return new
