"""Model-local functions: those of the model's operator versions are inlined, the others called.

A function says itself which versions its operators are of. Where they are the model's, its body
takes the place of the call before anything runs; where not, the interpreter runs the body, at the
function's own versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import onnx
import onnx.inliner

from sparsify.frontend.onnx.registry import handlers, standard

Functions = Mapping[tuple[str, str], onnx.FunctionProto]
"""By domain and name."""

_MOST_NODES: Final = 2**20
"""Of a model with all calls written out."""


def functions_of(proto: onnx.ModelProto) -> dict[tuple[str, str], onnx.FunctionProto]:
    return {(standard(function.domain), function.name): function for function in proto.functions}


def versions_of(
    proto: onnx.ModelProto | onnx.FunctionProto,
) -> dict[str, int]:
    """The version of each operator domain that a model or a function imports."""
    return {standard(entry.domain): entry.version for entry in proto.opset_import}


def check_calls(proto: onnx.ModelProto) -> None:
    """Refuses functions that call themselves, and those that call each other to no end.

    Two dozen functions that each call the next one twice are a file of a kilobyte and millions of
    nodes.

    Raises:
        ValueError: names the function, or the number of nodes.
    """
    functions, counts = functions_of(proto), dict[tuple[str, str], int | None]()

    def nodes_of(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in nested(nodes):
            key = standard(node.domain), node.op_type
            if key in functions and key not in counts:
                counts[key] = None
                counts[key] = nodes_of(functions[key].node)
            count = counts.get(key, 1)
            if count is None:
                raise ValueError(f"the function {node.op_type!r} calls itself")
            total += count
        return total

    if (total := nodes_of(proto.graph.node)) > _MOST_NODES:
        raise ValueError(f"its functions call each other for {total:.1e} nodes; damaged or hostile")


def inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """With the bodies of functions in place of their calls, save those that have a handler.

    Functions of other operator versions than the model's are left out of what is returned.
    """
    versions = versions_of(proto)
    fitting = [
        function
        for function in proto.functions
        if all(versions.get(d, v) == v for d, v in versions_of(function).items())
    ]
    if len(fitting) < len(proto.functions):
        whole = proto
        proto = onnx.ModelProto()
        proto.CopyFrom(whole)
        del proto.functions[:]
        proto.functions.extend(fitting)
    served = {(handler.domain, handler.operator) for handler in handlers()}
    local = set(functions_of(proto))
    called = {(standard(node.domain), node.op_type) for node in _nodes(proto)}
    if not called - served:
        return proto
    kept = [(domain or "ai.onnx", name) for domain, name in served - local]
    kept += [("", name) for domain, name in served - local if not domain]
    kept += [(domain, name) for domain, name in served & local]
    return onnx.inliner.inline_selected_functions(
        proto, kept, exclude=True, inline_schema_functions=True
    )


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of functions and sub-graphs among them."""
    return nested([*proto.graph.node, *(node for f in proto.functions for node in f.node)])


def nested(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes and those of their sub-graphs."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        yield node
        for attribute in node.attribute:
            pending += attribute.g.node
            pending += [inner for graph in attribute.graphs for inner in graph.node]


def body(function: onnx.FunctionProto, given: Mapping[str, onnx.AttributeProto]) -> onnx.GraphProto:
    """A function as a graph for one call, with the attributes of that call or their defaults."""
    attributes = {default.name: default for default in function.attribute_proto} | dict(given)
    graph = onnx.GraphProto(name=function.name)
    graph.input.extend(onnx.ValueInfoProto(name=name) for name in function.input)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in function.output)
    graph.node.extend(function.node)
    _bind(graph, attributes)
    return graph


def _bind(graph: onnx.GraphProto, attributes: Mapping[str, onnx.AttributeProto]) -> None:
    for node in graph.node:
        bound = []
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                value = attributes.get(attribute.ref_attr_name)
                if value is None:
                    continue  # the caller leaves it to the operator's default
                name = attribute.name
                attribute = onnx.AttributeProto()
                attribute.CopyFrom(value)
                attribute.name = name
            for inner in (attribute.g, *attribute.graphs):
                _bind(inner, attributes)
            bound.append(attribute)
        if len(bound) < len(node.attribute) or any(a.ref_attr_name for a in node.attribute):
            kept = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in bound]
            del node.attribute[:]
            node.attribute.extend(kept)
