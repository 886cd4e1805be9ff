"""What may be wrong with an ONNX model: each mutation does one such thing at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

Mutation = Callable[[onnx.ModelProto, random.Random], Any]


def _graphs(model: onnx.ModelProto) -> list[Any]:
    """All graphs of a model, and its functions."""
    found: list[Any] = [model.graph, *model.functions]
    for graph in found:
        for node in graph.node:
            found.extend(a.g for a in node.attribute if a.type == AttributeProto.GRAPH)
    return found


def _node(model: onnx.ModelProto, rng: random.Random) -> Any:
    return rng.choice([node for graph in _graphs(model) for node in graph.node])


def _attribute(model: onnx.ModelProto, rng: random.Random) -> tuple[Any, Any]:
    nodes = [n for graph in _graphs(model) for n in graph.node if n.attribute]
    node = rng.choice(nodes)
    return node, rng.choice(list(node.attribute))


def _tensor(model: onnx.ModelProto, rng: random.Random) -> Any:
    tensors = [t for g in _graphs(model) if hasattr(g, "initializer") for t in g.initializer]
    attributes = [a for g in _graphs(model) for n in g.node for a in n.attribute]
    return rng.choice(tensors + [a.t for a in attributes if a.type == AttributeProto.TENSOR])


_NUMBERS = (-(2**63), -(2**40), -2, -1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**63 - 1)


def without_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    node, attribute = _attribute(model, rng)
    node.attribute.remove(attribute)


def other_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    """One of another kind and value."""
    _, attribute = _attribute(model, rng)
    values = (
        rng.choice(_NUMBERS),
        rng.choice([0.0, -1.5, float("nan"), float("inf")]),
        rng.choices(_NUMBERS, k=rng.randrange(1, 4)),
        "nonsense",
        [1.5],
        helper.make_tensor("t", TensorProto.INT64, [2], [2**40, -1]),
    )
    attribute.CopyFrom(helper.make_attribute(attribute.name, rng.choice(values)))


def other_number_in_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    _, attribute = _attribute(model, rng)
    if attribute.type == AttributeProto.INT:
        attribute.i = rng.choice(_NUMBERS)
    elif attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(_NUMBERS)
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = rng.choice([0.0, -1.0, 1e38, float("nan")])
    elif attribute.type == AttributeProto.STRING:
        attribute.s = rng.choice([b"", b"\xff", b"nearest", attribute.s[:-1]])


def other_kind_of_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    _, attribute = _attribute(model, rng)
    attribute.type = rng.choice(AttributeProto.AttributeType.values())


def other_dims(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    if not tensor.dims or rng.random() < 0.2:
        tensor.dims.append(rng.choice(_NUMBERS))
    elif rng.random() < 0.3:
        tensor.dims.pop()
    else:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(_NUMBERS)


def other_type(model: onnx.ModelProto, rng: random.Random) -> None:
    _tensor(model, rng).data_type = rng.randrange(26)


def other_elements(model: onnx.ModelProto, rng: random.Random) -> None:
    """Integers that are sizes, axes and counts, mostly."""
    tensor = _tensor(model, rng)
    try:
        array = numpy_helper.to_array(tensor).copy()
    except Exception:
        return
    if array.size and array.dtype == np.int64:
        array.flat[rng.randrange(array.size)] = rng.choice(_NUMBERS)
    elif array.size and array.dtype == np.float32:
        array.flat[rng.randrange(array.size)] = rng.choice([np.nan, np.inf, 0, -1, 1e30])
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def less_data(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]


def other_edge(model: onnx.ModelProto, rng: random.Random) -> None:
    """An input that is another value: of another type, of later nodes, or of none."""
    node = _node(model, rng)
    names = [name for graph in _graphs(model) for n in graph.node for name in (*n.input, *n.output)]
    if node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice([*names, "", "nobody"])


def other_inputs(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    inputs = list(node.input)
    change = rng.choice(["fewer", "more", "shuffled"])
    if change == "fewer":
        inputs = inputs[:-1]
    elif change == "more":
        inputs += inputs[:1] or [""]
    else:
        rng.shuffle(inputs)
    del node.input[:]
    node.input.extend(inputs)


def other_outputs(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    names = [name for graph in _graphs(model) for n in graph.node for name in n.output]
    if rng.random() < 0.3 or not node.output:
        node.output.append(rng.choice(["more", *names]))
    else:
        node.output[rng.randrange(len(node.output))] = rng.choice([*names, ""])


def other_operator(model: onnx.ModelProto, rng: random.Random) -> None:
    node, other = _node(model, rng), _node(model, rng)
    if rng.random() < 0.5:
        node.op_type, node.domain = other.op_type, other.domain
    else:
        schemas = [s.name for s in onnx.defs.get_all_schemas() if not s.domain]
        node.op_type, node.domain = rng.choice(schemas), ""


def without_node(model: onnx.ModelProto, rng: random.Random) -> None:
    graph = rng.choice([graph for graph in _graphs(model) if graph.node])
    graph.node.remove(rng.choice(list(graph.node)))


def other_order(model: onnx.ModelProto, rng: random.Random) -> None:
    graph = rng.choice(_graphs(model))
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in graph.node]
    rng.shuffle(nodes)
    del graph.node[:]
    graph.node.extend(nodes)


def other_version(model: onnx.ModelProto, rng: random.Random) -> None:
    imports = rng.choice([model, *model.functions]).opset_import
    if rng.random() < 0.3:
        del imports[rng.randrange(len(imports)) :]
    else:
        rng.choice(list(imports)).version = rng.choice([*_NUMBERS, 7, 9, 11, 12, 13, 15, 18, 22])


def other_declaration(model: onnx.ModelProto, rng: random.Random) -> None:
    """Of an input or output of a graph: its type, a size, its name, or all of it."""
    graphs = [g for g in _graphs(model) if isinstance(g, onnx.GraphProto)]
    graph = rng.choice(graphs)
    values = rng.choice([graph.input, graph.output])
    if not values:
        return
    value = rng.choice(list(values))
    change = rng.choice(["type", "size", "name", "shape", "twice", "none"])
    tensor = value.type.tensor_type
    if change == "type":
        tensor.elem_type = rng.randrange(26)
    elif change == "size" and tensor.shape.dim:
        rng.choice(list(tensor.shape.dim)).dim_value = rng.choice(_NUMBERS)
    elif change == "name":
        value.name = rng.choice(["", "other", *(n.output[0] for n in graph.node if n.output)])
    elif change == "shape":
        tensor.ClearField("shape")
    elif change == "twice":
        values.append(value)
    else:
        values.remove(value)


def itself_within(model: onnx.ModelProto, rng: random.Random) -> None:
    """A function that calls itself, or a node of an unknown one."""
    node = _node(model, rng)
    node.op_type, node.domain = "Twice", "own"


MUTATIONS: tuple[Mutation, ...] = (
    without_attribute,
    other_attribute,
    other_number_in_attribute,
    other_kind_of_attribute,
    other_dims,
    other_type,
    other_elements,
    less_data,
    other_edge,
    other_inputs,
    other_outputs,
    other_operator,
    without_node,
    other_order,
    other_version,
    other_declaration,
    itself_within,
)


def damaged(model: onnx.ModelProto, seed: int) -> tuple[str, bytes]:
    """What was done, and the file."""
    rng = random.Random(seed)
    if rng.random() < 0.15:
        data = bytearray(model.SerializeToString())
        # Most bytes of a large file are weights: half of the places are where names are.
        near = min(len(data), 20_000)
        for _ in range(rng.randrange(1, 6)):
            start = rng.choice([0, len(data) - near])
            data[start + rng.randrange(near)] = rng.randrange(256)
        return "bytes", bytes(data)
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    chosen = [rng.choice(MUTATIONS) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    for mutation in chosen:
        try:
            mutation(copy, rng)
        except (ValueError, IndexError, TypeError):
            continue  # nothing there to change
    return " + ".join(m.__name__ for m in chosen), copy.SerializeToString()
