"""An exported program in the compiler's normal form: composite operators, weights as inputs.

Before, as torch.export leaves it          After

    p_emb  p_out (tied)  b_pos  c_lifted       p_emb  p_b_pos  p_c_lifted   (all PARAMETER)
      |      |             |       |             |       |        |
    add_ , transpose.int , dropout, linear     add , permute , clone , linear
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    InputKind,
    InputSpec,
    OutputKind,
    TensorArgument,
)

from sparsify.frontend.state import restore_writes
from sparsify.frontend.ties import with_ranges
from sparsify.program import ProgramSet, is_impure, rebuild

_KEPT = """
    linear matmul scaled_dot_product_attention layer_norm rms_norm group_norm softmax log_softmax
    gelu silu hardswish hardsigmoid conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d max_pool1d max_pool2d
    tril triu upsample_nearest2d upsample_bilinear2d
"""
KEPT_OPERATORS = frozenset(_KEPT.split())
"""ATen operators (any overload) that stay whole, because a kernel or a pass knows them whole."""


def normalise(exported: ExportedProgram, name: str = "forward") -> ProgramSet:
    """Functional form with the composite operators kept and every weight a PARAMETER input.

    Tied weights become one input under the first of their names. Weights that nothing uses go.
    Operators of ours that write a graph input go on writing it.

    Raises:
        ValueError: when the program changes its buffers or inputs, holds custom objects or
            sub-graphs (control flow), or computes nothing.
    """
    _refuse_objects(exported)
    table = torch.export.default_decompositions()
    for operator in list(table):
        namespace, overload = operator.name().split("::")
        if namespace == "aten" and overload.split(".")[0] in KEPT_OPERATORS:
            del table[operator]
    lowered = exported.run_decompositions(table)
    # Decomposing records sizes of its own that no input has.
    known = {s: r for s, r in lowered.range_constraints.items() if s in exported.range_constraints}
    lowered = restore_writes(with_ranges(lowered, known))
    _refuse_mutations(lowered)
    _refuse_subgraphs(lowered)
    program = ProgramSet.single(_weights_as_inputs(lowered), name)
    if not any(
        n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor | tuple | list)
        for n in program[name].graph.nodes
    ):
        raise ValueError(
            "the graph is empty: the model returns its inputs or constants and computes nothing; "
            "compile a model that computes at least one tensor"
        )
    return program


def _refuse_objects(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.input_specs:
        if spec.kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN):
            raise ValueError(
                f"the model holds a custom object ({spec.target or spec.arg.name}, "
                f"{spec.kind.name}), which is no tensor and cannot be compiled; replace it by "
                "tensors, for example by unpacking quantized or TorchBind weights"
            )


def _refuse_mutations(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind == OutputKind.USER_OUTPUT:
            continue
        what = "input" if spec.kind == OutputKind.USER_INPUT_MUTATION else "buffer"
        raise ValueError(
            f"the model changes its {what} {spec.target!r} in place, and a compiled program has "
            f"no hidden state; take the {what} as an input and return its new value, "
            "which exported C can remember (state and initial of export_c)"
        )


def _refuse_subgraphs(exported: ExportedProgram) -> None:
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "get_attr":
            raise ValueError(
                f"node {node.name} ({node.target}) runs a sub-graph (control flow or a change of "
                "mode such as autocast), which is not supported; write it with torch.where, or "
                "remove the context manager around it"
            )


def _weights_as_inputs(exported: ExportedProgram) -> ExportedProgram:
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(exported.graph, mapping)
    old_output = next(n for n in exported.graph.nodes if n.op == "output")
    graph.output(output).meta = copy.copy(old_output.meta)
    for before, after in mapping.items():
        after.meta = copy.copy(before.meta)
    graph.eliminate_dead_code(is_impure)
    # Copying a graph renames nodes that are called like Python builtins, "input" above all.
    placeholders = {old.name: new for old, new in mapping.items() if old.op == "placeholder"}

    specs: list[InputSpec] = []
    weights: dict[str, torch.Tensor] = {}
    tied: dict[tuple[object, ...], fx.Node] = {}
    for spec in exported.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            specs.append(replace(spec, arg=replace(spec.arg, name=node.name)))
            continue
        stored = exported.state_dict.get(spec.target)
        tensor = exported.constants[spec.target] if stored is None else stored
        if not node.users:
            graph.erase_node(node)
            continue
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if identity in tied and tensor.numel():
            node.replace_all_uses_with(tied[identity])
            graph.erase_node(node)
            continue
        tied[identity] = node
        weights[spec.target] = torch.nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
        if not tensor.is_contiguous():
            node.meta["val"] = node.meta["val"].contiguous()
        specs.append(InputSpec(InputKind.PARAMETER, TensorArgument(node.name), spec.target))
    # ExportedProgram wants the inputs in the signature's order, parameters first.
    specs.sort(key=lambda s: s.kind != InputKind.PARAMETER)
    _order_placeholders(graph, [s.arg.name for s in specs])

    signature = copy.copy(exported.graph_signature)
    signature.input_specs = specs
    final = next(n for n in graph.nodes if n.op == "output")
    signature.output_specs = [
        replace(spec, arg=replace(spec.arg, name=value.name))
        if isinstance(value, fx.Node)
        else spec
        for spec, value in zip(exported.graph_signature.output_specs, final.args[0], strict=True)
    ]
    return rebuild(exported, graph, signature, weights)


def _order_placeholders(graph: fx.Graph, names: list[str]) -> None:
    nodes = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    anchor = graph._root
    for name in names:
        if name in nodes:
            anchor.append(nodes[name])
            anchor = nodes[name]
