"""The one IR: entry programs over one store of weights.

A `Program` wraps a ``torch.export.ExportedProgram`` whose graph holds ATen and ``sparsify::*``
operators. It can be run, printed and saved with stock PyTorch at every stage. Passes never change
a program: they open a `sparsify.rewriter.Rewriter`, edit its copy of the graph, and take the
finished program.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._export.verifier import TrainingIRVerifier, Verifier
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from sparsify.effects import is_written, written_by

# torch.export copies tree specs of its own, about whose class torch warns.
warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)


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

    def state(self) -> list[fx.Node]:
        """The user inputs that the program changes in place."""
        return [node for node in self.user_inputs() if is_written(node)]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs eagerly in PyTorch, state changed in place: the oracle of every pass.

        Sizes are checked against the program's ranges. What torch.export assumed beside them while
        it traced (that no size is 1, for one) the frontend has tried and may have lifted.
        """
        with torch.no_grad():
            return self.exported.module(check_guards=False)(*args, **kwargs)


@dataclass(frozen=True)
class ProgramSet:
    """Entry programs (prefill and decode, buckets of token counts) over one store of weights."""

    programs: tuple[Program, ...]

    def __post_init__(self) -> None:
        names = [program.name for program in self.programs]
        wrong = [name for name in names if not name.isidentifier() or names.count(name) > 1]
        if wrong or not names:
            raise ValueError(
                f"entry programs {names}: there must be one, and each name an identifier of its own"
            )

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
    def names(self) -> tuple[str, ...]:
        return tuple(program.name for program in self.programs)

    @property
    def weights(self) -> WeightStore:
        """The weights of all programs.

        Raises:
            ValueError: two programs have different weights of one name.
        """
        store: dict[str, torch.Tensor] = {}
        for program in self.programs:
            for name, tensor in program.exported.state_dict.items():
                same_weight(name, store.setdefault(name, tensor), tensor)
        return WeightStore(store)


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


def equal_weights(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two weights have one type, shape and contents."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    same = left.data_ptr() == right.data_ptr() and left.stride() == right.stride()
    return same or torch.equal(left, right)


def same_weight(name: str, known: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that has this name already.

    Raises:
        ValueError: the other one has other contents.
    """
    if not equal_weights(known, tensor):
        raise ValueError(
            f"weight {name!r} already exists with other contents; give it another name"
        )
    return known


def rebuild(
    old: ExportedProgram,
    graph: fx.Graph,
    signature: Any,
    state_dict: dict[str, torch.Tensor],
    constants: dict[str, Any] | None = None,
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
        constants=constants or {},
        verifiers=verifiers_of(graph, old),
    )


def verifiers_of(graph: fx.Graph, old: ExportedProgram) -> list[type[Verifier]]:
    """torch's checks of a program; only those of the training dialect accept calls that write."""
    return [TrainingIRVerifier] if any(map(written_by, graph.nodes)) else old.verifiers


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


def is_impure(node: fx.Node) -> bool:
    """Whether a node matters though nothing reads it: inputs, the output, and writes."""
    return node.op in ("placeholder", "output") or bool(written_by(node))
