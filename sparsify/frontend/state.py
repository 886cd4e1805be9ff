"""Operators that write their operands, kept as they are through functionalisation.

Decomposing an exported program makes it functional; a write becomes a copy with a new name:

    v = auto_functionalized_v2(kv_append, key=k, ..., _all_bases=[keys, values])
    v[0] result    v[1] keys    v[2] values    outputs: v[1] -> keys, v[2] -> values

`restore_writes` takes that back, so that the program holds what will run:

    v = kv_append(keys, values, k, ...)
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from sparsify.program import rebuild

_FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized_v2
_WRITTEN = (OutputKind.USER_INPUT_MUTATION, OutputKind.BUFFER_MUTATION)


def restore_writes(exported: ExportedProgram) -> ExportedProgram:
    """Undoes functionalisation of our operators that write graph inputs; all else is kept.

    Raises:
        ValueError: one writes something else than a graph input.
    """
    graph = exported.graph
    calls = [n for n in graph.nodes if n.target is _FUNCTIONALIZED and _is_ours(n.args[0])]
    if not calls:
        return exported
    for node in calls:
        _restore(graph, node)
    output = next(n for n in graph.nodes if n.op == "output")
    signature = copy.copy(exported.graph_signature)
    kept = [
        (spec, value)
        for spec, value in zip(signature.output_specs, output.args[0], strict=True)
        if not _is_itself(exported, spec, value)
    ]
    signature.output_specs = [spec for spec, _ in kept]
    output.args = (tuple(value for _, value in kept),)

    return rebuild(exported, graph, signature, exported.state_dict, exported.constants)


def _is_ours(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "sparsify"


def _restore(graph: fx.Graph, node: fx.Node) -> None:
    target: Any = node.args[0]
    given: dict[str, Any] = dict(node.kwargs)
    bases: list[fx.Node] = given["_all_bases"]
    for base in bases:
        if base.op != "placeholder":
            raise ValueError(
                f"{target} writes {base.name}, which is no input of the program; an operator "
                "may only write a tensor that the caller owns"
            )
    operands = []
    for argument in target._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            operands.append(bases[given[f"_{argument.name}_base_index"]])
        else:
            operands.append(given.get(argument.name, argument.default_value))
    with graph.inserting_before(node):
        call = graph.call_function(target, tuple(operands))
    call.meta = copy.copy(node.meta)
    call.meta["val"] = node.meta["val"][0]
    for item in list(node.users):
        assert item.target is operator.getitem
        index: Any = item.args[1]
        item.replace_all_uses_with(bases[index - 1] if index else call)
        graph.erase_node(item)
    graph.erase_node(node)


def _is_itself(exported: ExportedProgram, spec: Any, value: Any) -> bool:
    """Whether an output only says that an input holds what was written into it."""
    inputs = {s.arg.name: s.target or s.arg.name for s in exported.graph_signature.input_specs}
    return spec.kind in _WRITTEN and inputs.get(getattr(value, "name", "")) == spec.target
