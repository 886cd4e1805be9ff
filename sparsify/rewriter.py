"""How passes change programs: a copy of the graph, edited, then finished to a new program."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.utils import _pytree

from sparsify.program import (
    Program,
    ProgramSet,
    equal_weights,
    fake_mode_of,
    is_impure,
    rebuild,
    same_weight,
)

_NUMBERED = re.compile(r"(.*\.)?_?(lifted_tensor_|tensor_constant)\d+")
"""Names that torch.export gives constants of a program."""


class Rewriter:
    """Edits a copy of a program's graph; `finish` returns the new program.

    Args:
        shared: weights of the programs beside it, by name, to which its own are added: weights of
            one name become one tensor.
    """

    def __init__(self, program: Program, shared: dict[str, torch.Tensor] | None = None) -> None:
        old = program.exported
        self._program = program
        self.graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        output = self.graph.graph_copy(old.graph, mapping)
        old_output = next(n for n in old.graph.nodes if n.op == "output")
        new_output = self.graph.output(output)
        new_output.meta = copy.copy(old_output.meta)
        for before, after in mapping.items():
            after.meta = copy.copy(before.meta)
        self._specs = {s.arg.name: s for s in old.graph_signature.input_specs}
        self._shared = {} if shared is None else shared
        self._weights = {
            n: same_weight(n, self._shared.setdefault(n, t), t) for n, t in old.state_dict.items()
        }
        self._states: dict[str, torch.Tensor] = {}
        self._fake_mode = fake_mode_of(old.graph)

    @property
    def name(self) -> str:
        """The program's name."""
        return self._program.name

    @property
    def nodes(self) -> list[fx.Node]:
        """A snapshot, safe to iterate while editing."""
        return list(self.graph.nodes)

    def weight_of(self, node: object) -> torch.Tensor | None:
        """The tensor behind a weight's input, None for any other node."""
        name = self.weight_name(node)
        return None if name is None else self._weights[name]

    def weight_name(self, node: object) -> str | None:
        """The name of a weight in the store, by its input; None for any other node."""
        spec = self._specs.get(node.name) if isinstance(node, fx.Node) else None
        return spec.target if spec is not None and spec.kind == InputKind.PARAMETER else None

    def may_name(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a weight may have this name: no other of the program or of the set has it."""
        mine = {s.target for s in self._specs.values() if s.kind == InputKind.PARAMETER}
        return name not in mine and equal_weights(self._shared.get(name, tensor), tensor)

    def add_weight(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """A graph input for a new weight, or the existing one when the same tensor has the name."""
        for spec in self._specs.values():
            if spec.target == name and spec.kind == InputKind.PARAMETER:
                same_weight(name, self._weights[name], tensor)
                return next(n for n in self.graph.nodes if n.name == spec.arg.name)
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder("p_" + "".join(c if c.isalnum() else "_" for c in name))
        parameter = torch.nn.Parameter(tensor.detach(), requires_grad=False)
        owned = same_weight(name, self._shared.setdefault(name, parameter), parameter)
        with self._fake_mode:
            node.meta["val"] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
        self._specs[node.name] = InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name)
        self._weights[name] = owned
        return node

    def add_state(self, name: str, shape: tuple[int | torch.SymInt, ...]) -> fx.Node:
        """A float32 input for state, by keyword, behind all others; it is there once.

        It becomes an argument of the program that the caller owns, zeros at first.
        """
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name == name:
                return node
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        with self._fake_mode:
            node.meta["val"] = torch.empty(shape)
        self._specs[name] = InputSpec(InputKind.USER_INPUT, TensorArgument(name), None)
        self._states[name] = torch.zeros([optimization_hint(extent) for extent in shape])
        return node

    def call(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """Inserts ``target(*args)`` at the graph's insertion point, with its fake value."""
        node = self.graph.call_function(target, args, kwargs or {})
        node.meta["val"] = self.evaluate(target, args, kwargs or {})
        return node

    def evaluate(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The fake value of an operator applied to nodes of this graph."""
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self._fake_mode:
            return target(*fake_args, **fake_kwargs)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Sends every use of ``old`` to ``new``; the output's name in the signature follows."""
        old.replace_all_uses_with(new)

    def finish(self) -> Program:
        """Drops dead nodes and unused weights and rebuilds the signature."""
        old = self._program.exported
        self.graph.eliminate_dead_code(is_impure_node=is_impure)
        for node in self.nodes:
            spec = self._specs.get(node.name)
            unused = node.op == "placeholder" and not node.users
            if unused and spec is not None and spec.kind == InputKind.PARAMETER:
                self.graph.erase_node(node)
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        placeholders.sort(key=lambda n: self._specs[n.name].kind != InputKind.PARAMETER)
        _move_to_front(self.graph, placeholders)
        signature = copy.copy(old.graph_signature)
        signature.input_specs = [self._specs[n.name] for n in placeholders]
        output = next(n for n in self.graph.nodes if n.op == "output")
        signature.output_specs = [
            replace(spec, arg=replace(spec.arg, name=value.name))
            if isinstance(value, fx.Node)
            else spec
            for spec, value in zip(old.graph_signature.output_specs, output.args[0], strict=True)
        ]
        used = {s.target for s in signature.input_specs if s.kind == InputKind.PARAMETER}
        exported = rebuild(
            old, self.graph, signature, {n: t for n, t in self._weights.items() if n in used}
        )
        return Program(self._program.name, with_keywords(exported, self._states))


def with_keywords(exported: ExportedProgram, added: Mapping[str, torch.Tensor]) -> ExportedProgram:
    """The program, called with more keyword arguments, by name with an example of each."""
    if not added:
        return exported
    root = copy.copy(exported.module_call_graph[0])
    root.signature = signature = copy.copy(root.signature)
    assert signature is not None
    positional, named = signature.in_spec.children()
    args = _pytree.tree_unflatten(range(positional.num_leaves), positional)
    kwargs = _pytree.tree_unflatten(range(named.num_leaves), named)
    _, signature.in_spec = _pytree.tree_flatten((args, {**kwargs, **dict.fromkeys(added, 0)}))
    signature.inputs = [*signature.inputs, *map(TensorArgument, added)]
    if signature.forward_arg_names is not None:
        signature.forward_arg_names = [*signature.forward_arg_names, *added]
    exported._module_call_graph = [root]
    if exported.example_inputs is not None:
        args, kwargs = exported.example_inputs
        exported._example_inputs = (args, {**kwargs, **added})
    return exported


def share_weights(programs: Iterable[Program]) -> ProgramSet:
    """Programs that were exported apart, over one store: weights of one name become one tensor.

    Constants that torch.export numbered are renamed where their contents differ.

    Raises:
        ValueError: another name stands for different contents.
    """
    shared: dict[str, torch.Tensor] = {}
    return ProgramSet(
        tuple(Rewriter(_apart(program, shared), shared).finish() for program in programs)
    )


def _apart(program: Program, shared: Mapping[str, torch.Tensor]) -> Program:
    """The program with a name of its own for each numbered constant that differs from another's."""
    old = program.exported
    renamed = {
        name: f"{program.name}.{name}"
        for name, tensor in old.state_dict.items()
        if _NUMBERED.fullmatch(name) and not equal_weights(shared.get(name, tensor), tensor)
    }
    signature = copy.copy(old.graph_signature)
    signature.input_specs = [
        replace(spec, target=renamed.get(spec.target, spec.target))
        if spec.kind == InputKind.PARAMETER and spec.target
        else spec
        for spec in old.graph_signature.input_specs
    ]
    state = {renamed.get(name, name): tensor for name, tensor in old.state_dict.items()}
    return Program(program.name, rebuild(old, old.graph, signature, state))


def _move_to_front(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    anchor = graph._root
    for node in nodes:
        anchor.append(node)
        anchor = node
