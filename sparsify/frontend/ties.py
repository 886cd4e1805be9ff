"""Inputs whose sizes belong together although the export gave them different symbols.

Hugging Face mask code reads ``mask[arange(batch), arange(length)]``, batch being that of input_ids:

    input_ids [s0, s1]   attention_mask [s2, s1]  ->  input_ids [s0, s1]   attention_mask [s0, s1]

torch.export only learns that ``s0 <= s2``. The program is narrowed to ``s0 == s2``, which callers
meet in practice; a mask of another batch size is then refused at the call instead of cut.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

aten = torch.ops.aten

_SHAPE_ONLY = (
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.view.default,
    aten.reshape.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
)
_REORDERED = (
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.clone.default,
    aten.contiguous.default,
)


def tie_indexed_sizes(exported: ExportedProgram) -> ExportedProgram:
    """Unifies the symbol of an indexed input dim with that of the arange that indexes it all."""
    inputs = set(exported.graph_signature.user_inputs)
    symbols = {
        size.node.expr
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.name in inputs
        for size in getattr(node.meta.get("val"), "shape", ())
        if isinstance(size, torch.SymInt)
    }
    changed = False
    for node in exported.graph.nodes:
        if node.target != aten.index.Tensor or not _comes_from(node.args[0], inputs):
            continue
        for size, index in zip(node.args[0].meta["val"].shape, node.args[1], strict=False):
            length = _arange_length(index)
            if length is None or not isinstance(size, torch.SymInt):
                continue
            a, b = size.node.expr, length.node.expr
            if a != b and {a, b} <= symbols and size.node.hint == length.node.hint:
                # Evaluating the comparison records the equality in the shape environment.
                changed |= bool(size == length)
    if not changed:
        return exported
    live = _live_symbols(exported.graph)
    ranges = {s: r for s, r in exported.range_constraints.items() if s in live}
    return with_ranges(exported, ranges)


def with_ranges(exported: ExportedProgram, ranges: dict) -> ExportedProgram:
    """The same program with other bounds of its symbolic sizes."""
    return ExportedProgram(
        root=exported.graph_module,
        graph=exported.graph,
        graph_signature=exported.graph_signature,
        state_dict=exported.state_dict,
        range_constraints=ranges,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=exported.constants,
        verifiers=exported.verifiers,
    )


def _live_symbols(graph: fx.Graph) -> set:
    live = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        for size in (value, *getattr(value, "shape", ())):
            if isinstance(size, torch.SymInt):
                live |= size.node.expr.free_symbols
    return live


def _comes_from(node: object, inputs: set[str]) -> bool:
    while isinstance(node, fx.Node) and node.target in (*_SHAPE_ONLY, *_REORDERED):
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "placeholder" and node.name in inputs


def _arange_length(node: object) -> torch.SymInt | None:
    """n if the node holds 0, 1 .. n-1 in any shape, n symbolic."""
    while isinstance(node, fx.Node) and (
        node.target in _SHAPE_ONLY
        or (node.target == aten.add.Tensor and isinstance(node.args[1], int) and not node.args[1])
    ):
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return None
    if node.target == aten.arange.start_step and node.args[2:] not in ((), (1,)):
        return None
    if node.target in (aten.arange.start, aten.arange.start_step):
        if not isinstance(node.args[0], int) or node.args[0]:
            return None
    elif node.target != aten.arange.default:
        return None
    value = node.meta["val"]
    return value.shape[0] if isinstance(value.shape[0], torch.SymInt) else None
