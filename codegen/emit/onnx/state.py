"""State in place becomes state in and state out: ONNX has no operators that write.

Before::

    kv_append(keys, values, ...)                         -> lengths

After::

    kv_appended(keys, values, ...)                       -> keys_1, values_1, lengths

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


@torch.library.register_fake("sparsify_onnx::kv_appended", lib=_LIBRARY)
def _fake(
    keys: torch.Tensor, values: torch.Tensor, key: Any, value: Any, pages: Any,
    starts: torch.Tensor, counts: Any, layer: int, offsets: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return torch.empty_like(keys), torch.empty_like(values), torch.empty_like(starts)


APPENDED = torch.ops.sparsify_onnx.kv_appended.default
"""`sparsify.ops.kv_append` as a function."""


def functional(program: Program) -> tuple[ExportedProgram, list[str]]:
    """The program without writes, and the names of the states that it returns after its results.

    Raises:
        ValueError: an operator other than `kv_append` writes, naming all that do.
    """
    states = [state.name for state in program.state()]
    if not states:
        return program.exported, []
    graph = copy.deepcopy(program.graph)
    writers = [node for node in graph.nodes if written_by(node)]
    others = sorted({str(n.target) for n in writers if n.target is not ops.kv_append.overload})
    if others:
        raise ValueError(f"{', '.join(others)}: operators that write cannot be exported to ONNX")
    latest: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "output":
            node.args = fx.map_arg(node.args, lambda operand: latest.get(operand, operand))
        if node in writers:
            _append(graph, node, latest)
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    final = [latest.get(inputs[name], inputs[name]) for name in states]
    return _returning(program.exported, graph, final), states


def _append(graph: fx.Graph, node: fx.Node, latest: dict[fx.Node, fx.Node]) -> None:
    keys, values, *rest = node.args[: len(APPENDED._schema.arguments)]
    with graph.inserting_before(node):
        call = graph.call_function(APPENDED, (keys, values, *rest))
        call.meta["val"] = (keys.meta["val"], values.meta["val"], node.meta["val"])
        parts = [graph.call_function(operator.getitem, (call, index)) for index in range(3)]
    for part, value in zip(parts, call.meta["val"], strict=True):
        part.meta["val"] = value
    node.replace_all_uses_with(parts[2])
    graph.erase_node(node)
    # The inputs themselves stand for all of their later forms.
    for old, new in zip((keys, values), parts, strict=False):
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
