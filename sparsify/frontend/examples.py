"""Example inputs: their accepted forms, and the dims of size 1 that hide a dynamic dim.

``torch.export`` takes a dim of size 1 for a constant. So dims of size 1 are widened before the
export, and after it the exported graph is probed at size 1 to see whether it serves that as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges

from sparsify.frontend.ties import with_ranges

Dim = tuple[Any, int]
"""A dim of an input: the key path of the tensor in ``(args, kwargs)``, and the dim's index."""


@dataclass(frozen=True)
class Examples:
    """Arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def parse(cls, example_inputs: object, halves: bool = False) -> Examples:
        """Accepts a tuple of arguments, a mapping of keyword arguments, or ``(args, kwargs)``.

        Args:
            halves: whether floating-point tensors of 16 bits are accepted, of a program that says
                itself where it widens them.

        Raises:
            TypeError: for any other form.
            ValueError: when no tensor is among them, or one is not a dense CPU tensor.
        """
        if isinstance(example_inputs, Mapping):
            examples = cls((), dict(example_inputs))
        elif not isinstance(example_inputs, tuple):
            raise TypeError(
                "example_inputs must be a tuple of arguments, a dict of keyword arguments, or "
                f"(args, kwargs), not {type(example_inputs).__name__}; for a single tensor x "
                "write (x,)"
            )
        elif (
            len(example_inputs) == 2
            and isinstance(example_inputs[0], tuple | list)
            and isinstance(example_inputs[1], Mapping)
        ):
            examples = cls(tuple(example_inputs[0]), dict(example_inputs[1]))
        else:
            examples = cls(example_inputs, {})
        examples._check(halves)
        return examples

    def _check(self, halves: bool) -> None:
        tensors = self.tensors()
        if not tensors:
            raise ValueError(
                "example_inputs hold no tensor, so there is no graph to compile; pass at least "
                "one tensor of the shape and dtype that the model is called with"
            )
        for path, tensor in tensors:
            where = f"example input {pytree.keystr(path)} of shape {tuple(tensor.shape)}"
            if tensor.device.type != "cpu":
                raise ValueError(
                    f"{where} is on device {tensor.device}; compilation runs on CPU tensors: "
                    "call .cpu() on it"
                )
            if tensor.layout != torch.strided:
                raise ValueError(f"{where} has layout {tensor.layout}; call .to_dense() on it")
            if 0 in tensor.shape:
                raise ValueError(
                    f"{where} is empty, which torch.export takes for a constant size; "
                    "give every dim a size of 1 or more"
                )
            wide = tensor.dtype == torch.float64
            if wide or (tensor.dtype in (torch.float16, torch.bfloat16) and not halves):
                raise ValueError(
                    f"{where} is {tensor.dtype}; floating-point inputs must be torch.float32: "
                    "call .float() on it"
                )

    def tensors(self) -> list[tuple[Any, torch.Tensor]]:
        leaves, _ = pytree.tree_flatten_with_path((self.args, self.kwargs))
        return [(path, leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]

    def map_tensors(self, change: Callable[[Any, torch.Tensor], torch.Tensor]) -> Examples:
        args, kwargs = pytree.tree_map_with_path(
            lambda path, x: change(path, x) if isinstance(x, torch.Tensor) else x,
            (self.args, self.kwargs),
        )
        return Examples(args, kwargs)

    def widened(self, dims: frozenset[Dim]) -> Examples:
        """Doubles the given dims by repetition, so that integer ids stay valid."""

        def widen(path: Any, x: torch.Tensor) -> torch.Tensor:
            counts = [2 if (path, d) in dims else 1 for d in range(x.dim())]
            return x.repeat(counts) if 2 in counts else x

        return self.map_tensors(widen)

    def unit_dims(self) -> frozenset[Dim]:
        return frozenset(
            (path, d) for path, x in self.tensors() for d, size in enumerate(x.shape) if size == 1
        )


def run_detached(model: torch.nn.Module, examples: Examples) -> Any:
    """Calls the model on copies of its buffers and inputs, so the user's stay as they are."""
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    inputs = examples.map_tensors(lambda _, x: x.clone())
    with torch.no_grad():
        return torch.func.functional_call(model, state, inputs.args, inputs.kwargs)


def widenable(model: torch.nn.Module, examples: Examples) -> frozenset[Dim]:
    """The size-1 dims that the model lets grow: all together, else by index, else one by one."""

    def runs(dims: frozenset[Dim]) -> bool:
        try:
            run_detached(model, examples.widened(dims))
        except Exception:
            return False
        return True

    unit = examples.unit_dims()
    if not unit or runs(unit):
        return unit
    accepted: frozenset[Dim] = frozenset()
    for index in sorted({d for _, d in unit}):
        group = frozenset(dim for dim in unit if dim[1] == index)
        if runs(accepted | group):
            accepted |= group
            continue
        for dim in sorted(group, key=str):
            if runs(accepted | {dim}):
                accepted |= {dim}
    return accepted


def input_nodes(exported: ExportedProgram) -> dict[Any, fx.Node]:
    """Key path in ``(args, kwargs)`` -> the placeholder of that tensor."""
    nodes = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    names = list(exported.graph_signature.user_inputs)
    tree = pytree.tree_unflatten(names, exported.call_spec.in_spec)
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return {path: nodes[name] for path, name in leaves if name in nodes}


def misread(
    exported: ExportedProgram, examples: Examples, widened: frozenset[Dim]
) -> frozenset[Dim]:
    """Widened dims by which the export no longer takes the examples as they were given.

    It took the dim for a constant, or for the size of another dim that it only broadcasts to.
    """
    nodes = input_nodes(exported)
    wrong: set[Dim] = set()
    uses: dict[Any, list[tuple[Dim, int]]] = {}
    for path, x in examples.tensors():
        for d, size in enumerate(nodes[path].meta["val"].shape):
            if isinstance(size, torch.SymInt):
                uses.setdefault(size.node.expr, []).append(((path, d), x.shape[d]))
            elif (path, d) in widened:
                wrong.add((path, d))
    for dims in uses.values():
        if len({size for _, size in dims}) > 1:
            wrong |= {dim for dim, _ in dims} & widened
    return frozenset(wrong)


def serve_size_one(
    exported: ExportedProgram, examples: Examples, model: torch.nn.Module | None
) -> ExportedProgram:
    """Lowers to 1 the bounds of dynamic dims that the export set to 2, where the graph allows it.

    The bound 2 only says that the export assumed the size to differ from 1. The assumption does
    no harm unless Python code of the model branched on it. So the graph is run with each such dim
    at 1, then with all that passed, and compared with the model; where they differ, it keeps 2.
    Other dims are at their least, or, where that does not run, as in the examples.
    Without a model (a program exported by the user) the graph itself is the meaning: it must run.
    """
    ranges = exported.range_constraints
    nodes = {
        path: node
        for path, node in input_nodes(exported).items()
        if isinstance(node.meta.get("val"), torch.Tensor)
    }
    dims = {
        size.node.expr
        for node in nodes.values()
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
    }
    symbols = {s for expr in dims for s in expr.free_symbols if s in ranges}
    floor = {s: int(ranges[s].lower) for s in symbols}
    unit = sorted((s for s in symbols if floor[s] == 2), key=str)
    if not unit:
        return exported

    own = {
        size.node.expr: x.shape[d]
        for path, x in examples.tensors()
        for d, size in enumerate(nodes[path].meta["val"].shape)
        if isinstance(size, torch.SymInt) and size.node.expr in floor
    }

    def agrees(at_one: list[Any]) -> bool | None:
        found = agrees_beside(floor, at_one)
        return agrees_beside({**floor, **own}, at_one) if found is None else found

    def agrees_beside(others: dict[Any, int], at_one: list[Any]) -> bool | None:
        """None: the model itself does not run at these sizes."""
        values = {**others, **dict.fromkeys(at_one, 1)}

        def narrow(path: Any, x: torch.Tensor) -> torch.Tensor:
            for d, size in enumerate(nodes[path].meta["val"].shape):
                if isinstance(size, torch.SymInt):
                    x = x.narrow(d, 0, min(int(size.node.expr.subs(values)), x.shape[d]))
            return x

        inputs = examples.map_tensors(narrow)
        try:
            expected = None if model is None else pytree.tree_leaves(run_detached(model, inputs))
        except Exception:
            return None
        try:
            got = _interpret(exported, inputs)
        except Exception:
            return None if model is None else False
        return expected is None or _same(got, expected)

    alone = {s: agrees([s]) for s in unit}
    possible = [s for s in unit if alone[s] is not False]
    together = agrees(possible)
    relaxed = {s for s in possible if together or alone[s]}
    if together is False or not relaxed:
        return exported
    bounds = {s: ValueRanges(1, r.upper) if s in relaxed else r for s, r in ranges.items()}
    return with_ranges(exported, bounds)


def _interpret(exported: ExportedProgram, examples: Examples) -> list[Any]:
    by_path = {path: x.clone() for path, x in examples.tensors()}
    given = {node.name: by_path.get(path) for path, node in input_nodes(exported).items()}
    values = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            values.append(given.get(spec.arg.name))
        else:
            stored = exported.state_dict.get(spec.target)
            tensor = exported.constants[spec.target] if stored is None else stored
            values.append(tensor if spec.kind == InputKind.PARAMETER else tensor.clone())
    with torch.no_grad():
        return list(fx.Interpreter(exported.graph_module).run(*values))


def _same(got: list[Any], expected: list[Any]) -> bool:
    if len(got) != len(expected):
        return False
    for a, b in zip(got, expected, strict=True):
        if not isinstance(b, torch.Tensor):
            if a != b:
                return False
        elif (
            a.shape != b.shape
            or a.dtype != b.dtype
            or not torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        ):
            return False
    return True
