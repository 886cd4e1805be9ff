"""Gives every linear of an ONNX graph its weight in the smallest form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify.codegen.emit.onnx.weights import StoredWeight, smallest
from sparsify.layouts import parse
from sparsify.ops import LINEARS, OPERATORS
from sparsify.ops.onnx import DOMAIN, ONNX_OPERATORS
from sparsify.ops.onnx.linear import WEIGHTS, Storage
from sparsify.ops.onnx.schema import camel

if TYPE_CHECKING:
    from onnxscript import ir


_FAMILIES = frozenset(name for name, made in OPERATORS.items() if made.overload in LINEARS)


def store_weights(model: ir.Model, *, dense: bool = False) -> dict[ir.Node, StoredWeight]:
    """Replaces the weights of all linears; nodes that share a weight share its tensors.

    Args:
        model: as translated, its linears with csr weights as PyTorch holds them, or dense ones.
        dense: store the matrices, in float32.

    Returns:
        What each linear holds now.
    """
    known: dict[tuple[ir.Value, ...], tuple[StoredWeight, list[ir.Value]]] = {}
    stored = {}
    for node in list(model.graph):
        operator = ONNX_OPERATORS.get(node.op_type) if node.domain == DOMAIN else None
        if operator is None or operator.family not in _FAMILIES:
            continue
        values = tuple(node.inputs[1 : 1 + len(WEIGHTS[_storage(node)])])
        if values not in known:
            weight = _stored(node, values, dense)
            known[values] = (weight, _initializers(model, weight, values))
        weight, tensors = known[values]
        stored[_with_weight(node, weight, tensors)] = weight
    return stored


def _storage(node: ir.Node) -> Storage:
    storage: Storage = node.attributes["storage"].as_string()
    return storage


def _stored(node: ir.Node, values: tuple[ir.Value, ...], dense: bool) -> StoredWeight:
    layout = parse(_storage(node))
    tensors = [value.const_value.raw.detach() for value in values]
    packed = dict(zip(layout.tensors, tensors, strict=True))
    shape = (node.attributes["out_features"].as_int(), node.attributes["in_features"].as_int())
    matrix = layout.unpack(packed, shape)
    weight = smallest(matrix)
    if dense or (weight.storage == "dense" and len(values[0].uses()) > 1):
        # Whoever else reads the matrix, an embedding say, reads float32.
        return StoredWeight("dense", {"weight": matrix}, weight.nnz, shape)
    return weight


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


def _with_weight(node: ir.Node, weight: StoredWeight, tensors: list[ir.Value]) -> ir.Node:
    from onnxscript import ir

    before = _storage(node)
    rest = node.inputs[1 + len(WEIGHTS[before]) :]
    kind = ONNX_OPERATORS[node.op_type.replace(camel(before), camel(weight.storage), 1)]
    new = ir.Node(
        node.domain,
        kind.name,
        [node.inputs[0], *tensors, *rest],
        {**node.attributes, "storage": ir.AttrString("storage", weight.storage)},
        name=node.name,
    )
    new.outputs[0].shape, new.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], [new], node.outputs, new.outputs
    )
    return new
