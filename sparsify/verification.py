"""What must hold of a program after every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsify.effects import is_view, written_by
from sparsify.program import Program, fake_mode_of


def verify(program: Program) -> None:
    """Checks a program after a pass: graph lint, the signature, and shapes by fake tensors.

    Shapes are recomputed where all operands are static. Recomputing symbolic ones could add guards
    that make them static: those were computed when `Rewriter.call` made the node.

    Raises:
        ValueError: naming the input, the node whose recomputed shape or dtype differs from what
            the graph says, or the node that changes or aliases a value it may not.
    """
    graph = program.graph
    graph.lint()
    _verify_effects(program)
    signature = program.exported.graph_signature
    missing = [n for n in program.weight_names.values() if n not in program.exported.state_dict]
    if missing:
        raise ValueError(f"program {program.name!r}: graph inputs without a weight: {missing}")
    declared = [s.arg.name for s in signature.input_specs]
    present = [n.name for n in graph.nodes if n.op == "placeholder"]
    if declared != present:
        raise ValueError(f"program {program.name!r}: signature {declared} but inputs {present}")
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        stated = node.meta.get("val")
        if stated is None and node.users:
            raise ValueError(
                f"program {program.name!r}: node {node.name} ({node.target}) has no shape"
            )
        if any(_is_symbolic(n.meta.get("val")) for n in (node, *node.all_input_nodes)):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with fake_mode_of(graph):
            found = node.target(*args, **kwargs)
        if _shape_and_type(found) != _shape_and_type(stated):
            raise ValueError(
                f"program {program.name!r}: node {node.name} ({node.target}) computes "
                f"{_shape_and_type(found)}, the graph says {_shape_and_type(stated)}"
            )


def _verify_effects(program: Program) -> None:
    """Only inputs change, and nothing sees one through a view: a backend may copy for a view."""
    inputs = set(program.user_inputs())
    for node in program.graph.nodes:
        for value in written_by(node):
            if value not in inputs:
                raise ValueError(
                    f"program {program.name!r}: node {node.name} ({node.target}) changes "
                    f"{value.name} in place, which is no input of the program; only the caller's "
                    "tensors can hold state"
                )
            views = [user for user in value.users if is_view(user)]
            if views:
                raise ValueError(
                    f"program {program.name!r}: node {views[0].name} ({views[0].target}) is a view "
                    f"of {value.name}, which {node.name} changes in place; give the whole tensor "
                    "to the operator that reads it"
                )


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(extent, torch.SymInt) for extent in value.shape)
    if isinstance(value, tuple | list):
        return any(map(_is_symbolic, value))
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def _shape_and_type(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, tuple | list):
        return tuple(_shape_and_type(item) for item in value)
    return type(value)
