"""How a program runs: regions, each compiled or left to PyTorch, and the values between them.

A pass marks the nodes of a program (``node.meta[REGION]``); `Plan.of` cuts it there::

    x -> embedding -> linear | -> histc | -> linear -> y
         forward_region_0,     forward_   forward_region_2,
        compiled              region_1,  compiled
                              torch
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree

from sparsify.effects import written_by
from sparsify.program import Program, verifiers_of

Kind = Literal["compiled", "torch"]
REGION = "sparsify_region"
"""Key of ``node.meta``: the name and the kind of the region that a node belongs to."""

Marks = dict[str, tuple[str, Kind]]
"""Region name and kind by node name."""


@dataclass(frozen=True)
class Region:
    """A part of a program that runs in one piece.

    Attributes:
        name: unique in a set of programs.
        program: its own program over the same weights.
        inputs: the values it reads, in the order of the program's inputs.
        outputs: the values it makes.
    """

    name: str
    kind: Kind
    program: Program
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Output:
    """One result of a program: the value ``name``, else a weight, a size or a constant."""

    name: str | None = None
    weight: str | None = None
    size: sympy.Expr | None = None
    constant: Any = None


@dataclass(frozen=True)
class Plan:
    """Regions in the order in which they run.

    Attributes:
        inputs: names of the values that the caller gives: the graph's user inputs, in order; None
            for an argument that was a constant when the model was exported.
    """

    regions: tuple[Region, ...]
    inputs: tuple[str | None, ...]
    outputs: tuple[Output, ...]

    @classmethod
    def of(cls, program: Program) -> Plan:
        """Cuts a program at its marks; one without marks is one compiled region.

        Raises:
            ValueError: a compiled region cannot know a size from the tensors that reach it.
        """
        cuts: dict[str, _Cut] = {}
        sizes = Sizes(program.user_inputs())
        whole = f"{program.name}_region_0", "compiled"
        for node in program.graph.nodes:
            if node.op == "call_function" and not sizes.is_size(node):
                name, kind = node.meta.get(REGION, whole)
                cuts.setdefault(name, _Cut(name, kind, program, sizes)).nodes.append(node)
        final = next(n for n in program.graph.nodes if n.op == "output")
        weights = program.weight_names
        outputs = tuple(_output(value, sizes, weights) for value in final.args[0])
        read = {output.name for output in outputs if output.name is not None}
        for cut in cuts.values():
            cut.copy()
            read.update(cut.inputs)
        signature = program.exported.graph_signature
        inputs = [
            None if isinstance(s.arg, ConstantArgument) else s.arg.name
            for s in signature.input_specs
            if s.kind == InputKind.USER_INPUT
        ]
        regions = tuple(cut.finish(read) for cut in cuts.values())
        return cls(regions, tuple(inputs), outputs)


def marks_of(program: Program) -> Marks:
    """The marks of a program, apart from its graph: a saved graph does not keep them."""
    marked = (n for n in program.graph.nodes if REGION in n.meta)
    return {node.name: node.meta[REGION] for node in marked}


def mark(program: Program, marks: Marks) -> None:
    """Puts marks on the nodes of a graph that was read from a file."""
    for node in program.graph.nodes:
        if node.name in marks:
            name, kind = marks[node.name]
            node.meta[REGION] = (name, kind)


class Sizes:
    """The sizes that flow in a program as numbers, and where a part of it can get them."""

    def __init__(self, user_inputs: Iterable[fx.Node]) -> None:
        self.binders: dict[sympy.Symbol, tuple[fx.Node, int]] = {}
        """Symbol -> a user input and the dim of it that is this symbol."""
        for node in user_inputs:
            for dim, extent in enumerate(_shape(node)):
                if isinstance(extent, torch.SymInt) and extent.node.expr.is_symbol:
                    self.binders.setdefault(extent.node.expr, (node, dim))

    def is_size(self, node: fx.Node) -> bool:
        """Whether a node only computes with sizes: every region that needs it repeats it."""
        if node.op != "call_function" or not is_number(node):
            return False
        if node.target == torch.ops.aten.sym_size.int:
            return True
        return all(self.is_size(operand) for operand in node.all_input_nodes)

    def binder(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """The user input and dim that give a ``sym_size`` node's value."""
        value = node.meta["val"]
        if node.target == torch.ops.aten.sym_size.int and isinstance(value, torch.SymInt):
            return self.binders.get(value.node.expr)
        return None

    def unbound(self, node: fx.Node) -> set[sympy.Symbol]:
        """The symbols in a node's value that are no dim of a user input."""
        return symbols_of(node) - self.binders.keys()

    def sources(self, node: fx.Node) -> Iterable[fx.Node]:
        """The values a node reads, each size followed to the tensor that it is taken from."""
        for operand in node.all_input_nodes:
            if not self.is_size(operand):
                yield operand
            elif (bound := self.binder(operand)) is not None:
                yield bound[0]
            else:
                yield from self.sources(operand)


class _Cut:
    """One region while its graph is copied out of the program's."""

    def __init__(self, name: str, kind: Kind, program: Program, sizes: Sizes) -> None:
        self.name, self.kind, self.program, self.sizes = name, kind, program, sizes
        self.nodes: list[fx.Node] = []
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.inputs: dict[str, fx.Node] = {}
        """Values that come from outside, by name, weights left out."""
        self.weights: dict[str, fx.Node] = {}

    def copy(self) -> None:
        for node in self.nodes:
            self._copy(node)
        if self.kind == "compiled":
            self._bind_symbols()

    def finish(self, read: set[str]) -> Region:
        """The region, giving away those of its values that are read elsewhere."""
        # A result of a call that writes goes out even unread: a backend drops what nothing reads.
        results = [n for n in self.nodes if n.name in read or (written_by(n) and not n.users)]
        given, names = [self.copies[n] for n in results], tuple(n.name for n in results)
        self.graph.output(tuple(given)).meta["val"] = tuple(n.meta["val"] for n in given)
        weight_names = self.program.weight_names
        targets = [weight_names[name] for name in self.weights]
        stored = self.program.exported.state_dict
        exported = ExportedProgram(
            root=torch.nn.Module(),
            graph=self.graph,
            graph_signature=self._signature(given, targets),
            state_dict={target: stored[target] for target in targets},
            range_constraints=self.program.exported.range_constraints,
            module_call_graph=[_call_entry(len(self.inputs), len(given))],
            constants={},
            verifiers=verifiers_of(self.graph, self.program.exported),
        )
        program = Program(self.name, exported)
        return Region(self.name, self.kind, program, tuple(self.inputs), names)

    def _signature(self, given: list[fx.Node], targets: list[str]) -> ExportGraphSignature:
        specs = [
            InputSpec(InputKind.PARAMETER, TensorArgument(node.name), target)
            for node, target in zip(self.weights.values(), targets, strict=True)
        ]
        specs += [
            InputSpec(InputKind.USER_INPUT, _argument(node), None) for node in self.inputs.values()
        ]
        anchor = self.graph._root
        for node in (*self.weights.values(), *self.inputs.values()):
            anchor.append(node)
            anchor = node
        outputs = [OutputSpec(OutputKind.USER_OUTPUT, _argument(node), None) for node in given]
        return ExportGraphSignature(specs, outputs)

    def _copy(self, node: fx.Node) -> fx.Node:
        for operand in node.all_input_nodes:
            if operand not in self.copies:
                self._fetch(operand)
        copied = self.graph.node_copy(node, lambda n: self.copies[n])
        return self._keep(node, copied)

    def _fetch(self, node: fx.Node) -> fx.Node:
        """A value from outside the region: an input, a weight, or a size computed again."""
        if node in self.copies:
            return self.copies[node]
        if not self.sizes.is_size(node):
            return self._input(node)
        bound = self.sizes.binder(node)
        if bound is None or self.copies.get(node.args[0]) is not None:
            return self._copy(node)
        source, dim = bound
        args = (self._fetch(source), dim)
        return self._keep(node, self.graph.call_function(node.target, args))

    def _input(self, node: fx.Node) -> fx.Node:
        placeholder = self.graph.placeholder(node.name)
        group = self.weights if node.name in self.program.weight_names else self.inputs
        group[node.name] = placeholder
        return self._keep(node, placeholder)

    def _keep(self, node: fx.Node, copied: fx.Node) -> fx.Node:
        copied.meta = {"val": node.meta.get("val")}
        self.copies[node] = copied
        return copied

    def _bind_symbols(self) -> None:
        """Adds inputs until every symbol of the region is a dim of one of them."""
        needed = {symbol for node in self.copies for symbol in symbols_of(node)}
        for symbol in sorted(needed - self._bound(), key=str):
            if symbol not in self.sizes.binders:
                raise ValueError(
                    f"{self.name}: the size {symbol} is no dimension of an input of the model or "
                    "of a value that reaches the region; a compiled region cannot know it"
                )
            self._fetch(self.sizes.binders[symbol][0])

    def _bound(self) -> set[Any]:
        shapes = [_shape(node) for node in self.inputs.values()]
        extents = [extent for shape in shapes for extent in shape]
        symbols = [e.node.expr for e in extents if isinstance(e, torch.SymInt)]
        return {symbol for symbol in symbols if symbol.is_symbol}


def symbols_of(node: fx.Node) -> set[sympy.Symbol]:
    """The symbols in the sizes of a node's value; strides do not count, inputs come contiguous."""
    values = _pytree.tree_leaves(node.meta.get("val"))
    sizes = [v.shape for v in values if isinstance(v, torch.Tensor)]
    numbers = [v for v in values if isinstance(v, torch.SymInt)]
    return {symbol for extent in (*sizes, *numbers) for symbol in free_symbols(extent)}


def _shape(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def is_number(node: fx.Node) -> bool:
    """Whether a node's value is one number, not a tensor."""
    numbers = int | float | torch.SymInt | torch.SymFloat | torch.SymBool
    return isinstance(node.meta.get("val"), numbers)


def _output(value: Any, sizes: Sizes, weights: Mapping[str, str]) -> Output:
    if not isinstance(value, fx.Node):
        return Output(constant=value)
    if value.name in weights:
        return Output(weight=weights[value.name])
    if sizes.is_size(value):
        extent = value.meta["val"]
        return Output(size=extent.node.expr if hasattr(extent, "node") else sympy.sympify(extent))
    return Output(value.name)


def _argument(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return TensorArgument(node.name)
    if isinstance(value, torch.SymFloat | float):
        return SymFloatArgument(node.name)
    if isinstance(value, torch.SymBool | bool):
        return SymBoolArgument(node.name)
    if isinstance(value, torch.SymInt | int):
        return SymIntArgument(node.name)
    raise ValueError(
        f"value {node.name} ({node.target}) is {type(value).__name__}, which cannot go from one "
        "region to another; keep it and its users in one region"
    )


def _call_entry(inputs: int, outputs: int) -> ModuleCallEntry:
    leaves = (0,) * inputs
    _, in_spec = _pytree.tree_flatten((leaves, {}))
    _, out_spec = _pytree.tree_flatten((0,) * outputs)
    return ModuleCallEntry("", ModuleCallSignature([], [], in_spec, out_spec))
