"""Runs an ONNX graph node by node; what follows from constants is computed at once.

Under torch.export this traces the graph: tensors are traced, constants are folded, and sizes are
calculated in Python, with symbols where they are dynamic.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import optimization_hint

from sparsify.frontend.onnx.functions import Functions, body, versions_of
from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import Handler, NeedsSizes, Unsupported, find, standard
from sparsify.frontend.onnx.tensors import is_kept_otherwise, to_computed
from sparsify.frontend.onnx.values import LARGEST, Constant, Value, known, settled, traced, untraced
from sparsify.frontend.onnx.weights import Weights


class _Refused:
    """The result of a node that has no handler."""


_REFUSED: Final[Any] = _Refused()
_TYPES: Final = ("to", "output_dtype", "dtype")
"""Attributes that say of which element type a node's first result is."""


@dataclass(frozen=True)
class Problem:
    """A node that could not be run.

    Attributes:
        of_sizes: whether other example sizes may help.
        needs_sizes: whether it runs at static sizes.
    """

    text: str
    of_sizes: bool
    needs_sizes: bool = False


@dataclass
class Scope:
    """Values by name; names that are not here are looked up in the graph around."""

    outer: Scope | None = None
    values: dict[str, Value] = field(default_factory=dict)

    def inner(self) -> Scope:
        return Scope(self)

    def __getitem__(self, name: str) -> Value:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.outer
        raise ValueError(
            f"the value {name!r} is read before any node computes it; the graph has a cycle, or "
            "its nodes are out of order"
        )


@dataclass(eq=False)
class Interpreter:
    """Attributes:
    versions: of each operator domain that the model imports.
    weights: where constants become weights.
    functions: model-local ones that nodes may call.
    problems: nodes that could not be run, while ``weights.collecting``; else they raise.
    types: the ONNX element types of values that are kept in another one, as far as declared.
    """

    versions: Mapping[str, int]
    weights: Weights
    functions: Functions = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    types: dict[str, int] = field(default_factory=dict)
    _constants: dict[int, tuple[onnx.GraphProto, dict[str, Constant]]] = field(default_factory=dict)
    _calls: dict[tuple[str, ...], tuple[Interpreter, onnx.GraphProto]] = field(default_factory=dict)

    def run(self, graph: onnx.GraphProto, scope: Scope, inputs: Sequence[Value]) -> list[Value]:
        """The graph's outputs, given its inputs (those without an initializer) in order."""
        scope.values.update(self.constants(graph))
        names = [i.name for i in graph.input if i.name not in scope.values]
        scope.values.update(zip(names, inputs, strict=True))
        for proto in graph.node:
            if all(name in scope.values for name in proto.output if name):
                continue  # folded
            node = self._node(proto, scope)
            scope.values.update(zip(node.outputs, self._results(node), strict=False))
        return [scope[output.name] for output in graph.output]

    def constants(self, graph: onnx.GraphProto) -> dict[str, Constant]:
        """Initializers, and what follows from them alone; computed once."""
        if id(graph) not in self._constants:
            scope = Scope()
            self._note_types(graph)
            for tensor in graph.initializer:
                scope.values[tensor.name] = _stored(_weight(tensor), tensor.name)
            for proto in graph.node:
                if all(name in scope.values for name in proto.input if name):
                    node = self._node(proto, scope)
                    scope.values.update(self._folded(node))
            # The graph is held too: another one could get its identity.
            self._constants[id(graph)] = graph, scope.values  # type: ignore[assignment]
        return self._constants[id(graph)][1]

    def _note_types(self, graph: onnx.GraphProto) -> None:
        declared = [(value.name, value.type.tensor_type.elem_type) for value in graph.input]
        stored = [(tensor.name, tensor.data_type) for tensor in graph.initializer]
        told = [(n.output[0], a) for n in graph.node for a in n.attribute if n.output]
        made = [(name, a.i) for name, a in told if a.name in _TYPES]
        values = [(name, a.t.data_type) for name, a in told if a.HasField("t")]
        for name, code in (*declared, *stored, *made, *values):
            if is_kept_otherwise(code):
                self.types[name] = code

    def _node(self, proto: onnx.NodeProto, scope: Scope) -> Node:
        domain = standard(proto.domain)
        return Node(
            proto.op_type,
            domain,
            self.versions.get(domain, 0),
            proto.name or next(filter(None, proto.output), ""),
            tuple(proto.input),
            tuple(proto.output),
            {attribute.name: attribute for attribute in proto.attribute},
            _module(proto),
            self,
            scope,
        )

    def _folded(self, node: Node) -> dict[str, Constant]:
        """The outputs of a node of constants; none when that must wait for the run."""
        handler = find(node.domain, node.operator, node.version)
        if handler is None or _has_graph(node):
            return {}
        inputs = [node.scope[name] if name else None for name in node.inputs]
        try:
            results = self._fold(node, handler, inputs)
        except Exception:
            return {}  # the run says what is wrong
        named = [
            (n, c.tensor)
            for n, c in zip(node.outputs, results, strict=False)
            if n and isinstance(c, Constant)
        ]
        if not inputs:
            # The integers of Constant nodes are sizes and the like.
            return {n: _stored(t, n, counts=t.is_floating_point()) for n, t in named}
        given = [value for value in inputs if isinstance(value, Constant)]
        sources = frozenset[str]().union(*(value.sources for value in given))
        # What was made of one weight is that weight, in another form.
        (only,) = sources if len(sources) == 1 and len(named) == 1 else (None,)
        return {name: Constant(tensor, only or name, sources) for name, tensor in named}

    def _results(self, node: Node) -> list[Value]:
        inputs = [node.scope[name] if name else None for name in node.inputs]
        try:
            handler = find(node.domain, node.operator, node.version)
            function = self.functions.get((node.domain, node.operator))
            if handler is None and function is None:
                raise Unsupported("has no handler")
            if any(value is _REFUSED for value in inputs):
                return [_REFUSED] * len(node.outputs)
            if handler is not None:
                results = self._compute(node, handler, inputs)
            else:
                results = self._call(node, function, inputs)
            if len(results) < sum(map(node.wants, range(len(node.outputs)))):
                raise Unsupported(
                    f"its outputs {list(node.outputs[len(results) :])} are not served"
                )
            return results
        except Exception as error:
            problem = f"{node}: {_reason(error, inputs)}"
            if not self.weights.collecting:
                raise ValueError(problem) from error
            self.problems.append(
                Problem(problem, not isinstance(error, Unsupported), isinstance(error, NeedsSizes))
            )
            return [_REFUSED] * len(node.outputs)

    def _call(self, node: Node, function: onnx.FunctionProto, inputs: list[Value]) -> list[Value]:
        """The results of a function, whose operators have versions of their own."""
        if node.outputs not in self._calls:
            # Kept, so that each run meets the same constants.
            inner = Interpreter(versions_of(function), self.weights, self.functions, self.problems)
            self._calls[node.outputs] = inner, body(function, node.attributes)
        inner, graph = self._calls[node.outputs]
        for index, name in enumerate(function.input[: len(inputs)]):
            if code := node.element_type(index):
                inner.types[name] = code
        missing: list[Value] = [None] * (len(function.input) - len(inputs))
        return inner.run(graph, Scope(), [*inputs, *missing])

    def _compute(self, node: Node, handler: Handler, inputs: list[Value]) -> list[Value]:
        arrays = [known(value) for value in inputs]
        if not _has_graph(node) and all(
            value is None or array is not None for value, array in zip(inputs, arrays, strict=True)
        ):
            if not any(isinstance(value, np.ndarray) for value in inputs):
                return self._fold(node, handler, inputs)
            sizes = self._on_sizes(node, handler, arrays)
            if sizes is not None:
                return sizes
        arguments: list[Any] = []
        for name, value, array in zip(handler.parameters(len(inputs)), inputs, arrays, strict=True):
            if name in handler.host:
                if array is None and value is not None:
                    raise Unsupported(f"{name} is computed from the model's inputs")
                arguments.append(array)
            elif isinstance(value, Constant) and name not in handler.constants:
                arguments.append(self.weights.parameter(value))
            else:
                arguments.append(traced(value) if isinstance(value, np.ndarray) else value)
        results = _values(handler.run(node, *arguments))
        for result in results:
            if isinstance(result, torch.Tensor):
                _check_size(result)
        return results

    @staticmethod
    def _on_sizes(
        node: Node, handler: Handler, arrays: list[np.ndarray | None]
    ) -> list[Value] | None:
        """The results as sizes; None where they must be tensors.

        The shapes of arrays are static, so what shapes them must be known.
        """
        if handler.on_sizes is None:
            return None
        names = handler.parameters(len(arrays))
        for name, array in zip(names, arrays, strict=True):
            if name in handler.host and array is not None and array.dtype == object:
                return None
        results = handler.on_sizes(node, *arrays)
        return None if results is NotImplemented else _values(results)

    def _fold(self, node: Node, handler: Handler, inputs: list[Value]) -> list[Value]:
        names = handler.parameters(len(inputs))
        arguments = [
            known(value) if name in handler.host else getattr(value, "tensor", None)
            for name, value in zip(names, inputs, strict=True)
        ]
        with untraced():
            _check_fold(node, handler, arguments)
            results = _values(handler.run(node, *arguments))
        return [Constant(r) if isinstance(r, torch.Tensor) else r for r in results]


def _module(proto: onnx.NodeProto) -> str:
    """The module that PyTorch's exporter says a node comes from, its last scope but one."""
    for entry in proto.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = re.findall(r"'([^']*)'", entry.value)
            return scopes[-2] if len(scopes) > 1 else ""
    return ""


def _stored(tensor: torch.Tensor, name: str, counts: bool = True) -> Constant:
    """A constant of the file; the parts of one of our packed weights are of the same source."""
    counts = counts and tensor.numel() > 1 and tensor.dtype not in (torch.int64, torch.int32)
    return Constant(tensor, name, frozenset([name.partition(":")[0]] if counts else ()))


def _weight(tensor: onnx.TensorProto) -> torch.Tensor:
    where = f"the weight {tensor.name!r} of sizes {list(tensor.dims)}"
    if any(size < 0 for size in tensor.dims):
        raise ValueError(f"{where} has a negative size; the file is damaged")
    try:
        return to_computed(tensor)
    except Unsupported as error:
        raise ValueError(f"{where}: {error} is not supported") from error
    except Exception as error:  # NumPy's and the onnx package's own
        raise ValueError(f"{where} cannot be read: {error}; the file is damaged") from error


def _has_graph(node: Node) -> bool:
    return any(a.type == onnx.AttributeProto.GRAPH for a in node.attributes.values())


def _values(results: Any) -> list[Value]:
    """What a handler returned as values, sizes that are known as constants."""
    results = results if isinstance(results, tuple | list) else (results,)
    return [settled(r) if isinstance(r, np.ndarray) else r for r in results]


def _check_size(tensor: torch.Tensor) -> None:
    count = tensor.numel() * tensor.element_size()
    if isinstance(count, torch.SymInt):
        count = optimization_hint(count, fallback=0)
    if count > LARGEST:
        raise Unsupported(
            f"a result of shape {list(tensor.shape)} takes {count / 2**30:.0f} GiB; the largest "
            f"that is computed is {LARGEST / 2**30:.0f} GiB"
        )


def _check_fold(node: Node, handler: Handler, arguments: list[Any]) -> None:
    """Refuses constants that memory is too small for, before they are computed."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            results = _values(handler.run(node, *fake))
        except Exception:
            return  # it depends on elements, or the real run says what is wrong
        for result in results:
            if isinstance(result, torch.Tensor):
                _check_size(result)


def _reason(error: Exception, inputs: Sequence[Value]) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    if isinstance(error, Unsupported):
        return line
    shapes = ", ".join("none" if v is None else str(_shape(v)) for v in inputs)
    return f"fails on inputs of shapes {shapes}: {type(error).__name__}: {line}"


def _shape(value: Value) -> list[Any]:
    return list(value.tensor.shape if isinstance(value, Constant) else getattr(value, "shape", ()))
