"""The one IR: entry programs over one store of weights, and how passes rewrite them.

A `Program` wraps a ``torch.export.ExportedProgram`` whose graph holds ATen and ``sparsify::*``
operators. It can be run, printed and saved with stock PyTorch at every stage. Passes never change
a program: they open a `Rewriter`, edit its copy of the graph, and take the finished program.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from sparsify.layouts import Layout, WeightStats
from sparsify.report import Decision


class WeightStore(Mapping[str, torch.Tensor]):
    """Named weights, owned once; entry programs and packed forms refer to them by name.

    The mapping is immutable: `adding` and `keeping` return new stores that share the tensors.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor] = {}) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def adding(self, tensors: Mapping[str, torch.Tensor]) -> WeightStore:
        return WeightStore({**self._tensors, **tensors})

    def keeping(self, names: Iterable[str]) -> WeightStore:
        kept = set(names)
        return WeightStore({n: t for n, t in self._tensors.items() if n in kept})

    @property
    def nbytes(self) -> int:
        """Bytes of distinct storage; tied weights count once."""
        distinct = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.values()
        }
        return sum(distinct.values())

    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes."""
        total = hashlib.sha256()
        for name in sorted(self._tensors):
            tensor = self._tensors[name].detach().contiguous()
            total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()


@dataclass(frozen=True)
class Program:
    """One entry point.

    Every weight, buffer and lifted constant is a graph input of kind PARAMETER whose ``target`` is
    its name in the `WeightStore`.
    """

    name: str
    exported: ExportedProgram

    @property
    def graph(self) -> fx.Graph:
        return self.exported.graph

    @property
    def weights(self) -> WeightStore:
        return WeightStore(self.exported.state_dict)

    @property
    def weight_names(self) -> dict[str, str]:
        """Placeholder name -> weight name."""
        specs = self.exported.graph_signature.input_specs
        return {s.arg.name: s.target for s in specs if s.kind == InputKind.PARAMETER and s.target}

    def weight_of(self, node: object) -> torch.Tensor | None:
        """The tensor behind a weight's placeholder node, None for any other node."""
        name = self.weight_names.get(node.name) if isinstance(node, fx.Node) else None
        return None if name is None else self.exported.state_dict[name]

    def user_inputs(self) -> list[fx.Node]:
        names = set(self.exported.graph_signature.user_inputs)
        return [n for n in self.graph.nodes if n.op == "placeholder" and n.name in names]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs eagerly in PyTorch: the oracle of every pass."""
        with torch.no_grad():
            return self.exported.module()(*args, **kwargs)

    def rewrite(self) -> Rewriter:
        return Rewriter(self)


@dataclass(frozen=True)
class ProgramSet:
    """Entry programs (prefill and decode, buckets of token counts) over one store of weights."""

    programs: tuple[Program, ...]

    @classmethod
    def single(cls, exported: ExportedProgram, name: str = "forward") -> ProgramSet:
        return cls((Program(name, exported),))

    def __iter__(self) -> Iterator[Program]:
        return iter(self.programs)

    def __getitem__(self, name: str) -> Program:
        for program in self.programs:
            if program.name == name:
                return program
        raise KeyError(f"no entry program {name!r}; there are {[p.name for p in self.programs]}")

    @property
    def weights(self) -> WeightStore:
        store = WeightStore()
        for program in self.programs:
            store = store.adding(program.weights)
        return store


@dataclass(frozen=True)
class Site:
    """A place in a program where sparsity can pay: a linear operator and its weight."""

    program: str
    node: str
    weight: str
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        return self.weight.removesuffix(".weight")


class Rewriter:
    """Edits a copy of a program's graph; `finish` returns the new program."""

    def __init__(self, program: Program) -> None:
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
        self._weights = dict(old.state_dict)
        self._fake_mode = fake_mode_of(old.graph)

    @property
    def nodes(self) -> list[fx.Node]:
        """A snapshot, safe to iterate while editing."""
        return list(self.graph.nodes)

    def weight_of(self, node: object) -> torch.Tensor | None:
        name = self.weight_name(node)
        return None if name is None else self._weights[name]

    def weight_name(self, node: object) -> str | None:
        spec = self._specs.get(node.name) if isinstance(node, fx.Node) else None
        return spec.target if spec is not None and spec.kind == InputKind.PARAMETER else None

    def add_weight(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """A graph input for a new weight, or the existing one when the same tensor has the name."""
        for spec in self._specs.values():
            if spec.target == name and spec.kind == InputKind.PARAMETER:
                if self._weights[name] is not tensor and not torch.equal(
                    self._weights[name], tensor
                ):
                    raise ValueError(f"weight {name!r} already exists with other contents")
                return next(n for n in self.graph.nodes if n.name == spec.arg.name)
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder("p_" + "".join(c if c.isalnum() else "_" for c in name))
        parameter = torch.nn.Parameter(tensor.detach(), requires_grad=False)
        with self._fake_mode:
            node.meta["val"] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
        self._specs[node.name] = InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name)
        self._weights[name] = parameter
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
        """Drops dead nodes and unused weights and rebuilds the signature; see `verify`."""
        old = self._program.exported
        self.graph.eliminate_dead_code(is_impure_node=_is_impure)
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
        return Program(self._program.name, exported)


def rebuild(
    old: ExportedProgram, graph: fx.Graph, signature: Any, state_dict: dict[str, torch.Tensor]
) -> ExportedProgram:
    """An ExportedProgram with another graph, signature and weights, all else kept."""
    graph.lint()
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=graph,
        graph_signature=signature,
        state_dict=state_dict,
        range_constraints=old.range_constraints,
        module_call_graph=old.module_call_graph,
        example_inputs=old.example_inputs,
        constants={},
        verifiers=old.verifiers,
    )


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode whose shape environment holds the graph's symbols."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise ValueError(
        "the graph is empty: it has no tensor input and computes nothing; "
        "export a model that takes at least one tensor"
    )


def verify(program: Program) -> None:
    """Checks a program after a pass: graph lint, the signature, and shapes by fake tensors.

    Shapes are recomputed where all operands are static. Recomputing symbolic ones could add guards
    that make them static: those were computed when `Rewriter.call` made the node.

    Raises:
        ValueError: naming the input, or the node whose recomputed shape or dtype differs from what
            the graph says.
    """
    graph = program.graph
    graph.lint()
    signature = program.exported.graph_signature
    missing = [n for n in program.weight_names.values() if n not in program.exported.state_dict]
    if missing:
        raise ValueError(f"program {program.name!r}: graph inputs without a weight: {missing}")
    declared = [s.arg.name for s in signature.input_specs]
    present = [n.name for n in graph.nodes if n.op == "placeholder"]
    if declared != present:
        raise ValueError(f"program {program.name!r}: signature {declared} but inputs {present}")
    for node in graph.nodes:
        if node.op != "call_function" or _is_impure(node):
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


def _is_impure(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output")


def _move_to_front(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    anchor = graph._root
    for node in nodes:
        anchor.append(node)
        anchor = node


class CostModel(Protocol):
    """Predicts kernel time; codegen implements it, passes only see this."""

    def linear_seconds(
        self, layout: Layout, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        """Seconds of ``y[tokens, rows] = x[tokens, cols] @ W.T`` with W stored in ``layout``."""
        ...

    def candidates(self, shape: tuple[int, int], nnz: int) -> tuple[Layout, ...]:
        """Layouts the target has kernels for, most promising first."""
        ...


@dataclass(frozen=True)
class PassContext:
    """What a pass may know besides the programs."""

    cost: CostModel | None = None
    target: str = ""
    strict: bool = False
    disabled_sites: frozenset[str] = frozenset()
    unsupported: Callable[[fx.Node], str | None] | None = None
    """Why the target cannot compile an operator; codegen gives it, only `partition` asks."""


@dataclass(frozen=True)
class PassResult:
    programs: ProgramSet
    decisions: tuple[Decision, ...] = ()
    analysis: Mapping[str, WeightStats] = field(default_factory=dict)
    """Structure of the weights by site, from passes that measure."""


class Pass(Protocol):
    """A rewrite: a frozen dataclass whose fields are its options."""

    name: ClassVar[str]

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult: ...


@dataclass(frozen=True)
class GraphPass:
    """Base of passes that treat each entry program alone: implement `rewrite`."""

    name: ClassVar[str] = ""
    tolerance: ClassVar[float] = 0.0
    """Largest error relative to the output's scale that ``verify="numeric"`` accepts."""

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        decisions: list[Decision] = []
        done = []
        for program in programs:
            rewriter = program.rewrite()
            decisions.extend(self.rewrite(rewriter, context))
            done.append(rewriter.finish())
        return PassResult(ProgramSet(tuple(done)), tuple(decisions))

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        """Edits ``rewriter.graph`` in place; returns what was decided."""
        raise NotImplementedError
