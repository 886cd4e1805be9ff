"""State in place becomes state in and state out: ONNX has no operators that write.

Before::

    kv_append(keys, values, ...)                         -> lengths
    page_bounds(bounds, keys, ..., lengths, ...)         -> lengths_1

After::

    kv_appended(keys, values, ...)                       -> keys_1, values_1, lengths
    page_bounded(bounds, keys_1, ..., lengths, ...)      -> bounds_1, lengths_1

and whatever read the state reads the new one. The last of each state is an output of the program.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree

from sparsify import ops
from sparsify.effects import written_by
from sparsify.program import Program, rebuild

_LIBRARY = torch.library.Library("sparsify_onnx", "DEF")
_LIBRARY.define(
    "kv_appended(Tensor keys, Tensor values, Tensor key, Tensor value, Tensor pages, "
    "Tensor starts, Tensor counts, int layer, int[] offsets) -> (Tensor, Tensor, Tensor)"
)

_LIBRARY.define(
    "page_bounded(Tensor bounds, Tensor keys, Tensor pages, Tensor lengths, Tensor counts, "
    "int layer) -> (Tensor, Tensor)"
)


@torch.library.register_fake("sparsify_onnx::kv_appended", lib=_LIBRARY)
def _fake(
    keys: torch.Tensor, values: torch.Tensor, key: Any, value: Any, pages: Any,
    starts: torch.Tensor, counts: Any, layer: int, offsets: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return torch.empty_like(keys), torch.empty_like(values), torch.empty_like(starts)


@torch.library.register_fake("sparsify_onnx::page_bounded", lib=_LIBRARY)
def _fake_bounded(
    bounds: torch.Tensor, keys: Any, pages: Any, lengths: torch.Tensor, counts: Any, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(bounds), torch.empty_like(lengths)


APPENDED = torch.ops.sparsify_onnx.kv_appended.default
BOUNDED = torch.ops.sparsify_onnx.page_bounded.default
_FUNCTIONS = {ops.kv_append.overload: APPENDED, ops.page_bounds.overload: BOUNDED}
"""Operators that write, as functions: first what was written, then their result."""


def functional(program: Program) -> tuple[ExportedProgram, list[str]]:
    """The program without writes, and the names of the states that it returns after its results.

    Raises:
        ValueError: an operator writes for which there is no function, naming all that do.
    """
    states = [state.name for state in program.state()]
    if not states:
        return program.exported, []
    graph = copy.deepcopy(program.graph)
    writers = [node for node in graph.nodes if written_by(node)]
    others = sorted({str(n.target) for n in writers if n.target not in _FUNCTIONS})
    if others:
        raise ValueError(f"{', '.join(others)}: operators that write cannot be exported to ONNX")
    latest: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "output":
            node.args = fx.map_arg(node.args, lambda operand: latest.get(operand, operand))
        if node in writers:
            _write(graph, node, latest)
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    final = [latest.get(inputs[name], inputs[name]) for name in states]
    return _returning(program.exported, graph, final), states


def _write(graph: fx.Graph, node: fx.Node, latest: dict[fx.Node, fx.Node]) -> None:
    function, written = _FUNCTIONS[node.target], written_by(node)
    with graph.inserting_before(node):
        call = graph.call_function(function, node.args[: len(function._schema.arguments)])
        call.meta["val"] = (*(state.meta["val"] for state in written), node.meta["val"])
        parts = [graph.call_function(operator.getitem, (call, i)) for i in range(len(written) + 1)]
    for part, value in zip(parts, call.meta["val"], strict=True):
        part.meta["val"] = value
    node.replace_all_uses_with(parts[-1])
    graph.erase_node(node)
    # The inputs themselves stand for all of their later forms.
    for old, new in zip(written, parts, strict=False):
        source = next((s for s, form in latest.items() if form is old), old)
        latest[source] = new


def _returning(
    exported: ExportedProgram, graph: fx.Graph, states: list[fx.Node]
) -> ExportedProgram:
    """The program with more results."""
    output = graph.output_node()
    output.args = ((*output.args[0], *states),)
    signature = copy.copy(exported.graph_signature)
    signature.output_specs = [
        *signature.output_specs,
        *(OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(s.name), None) for s in states),
    ]
    made = rebuild(exported, graph, signature, exported.state_dict, exported.constants)
    root = copy.copy(exported.module_call_graph[0])
    root.signature = copy.copy(root.signature)
    _, root.signature.out_spec = _pytree.tree_flatten(tuple(range(len(signature.output_specs))))
    made._module_call_graph = [root]
    return made
