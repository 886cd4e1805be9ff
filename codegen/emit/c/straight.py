"""A lowered entry as straight-line code: calls of kernels on tensors whose places are known.

    t = call_tir(to_lanes, (x,))            calls  to_lanes(input 0, arena 0)
    u = call_tir(linear, (t, w))        ->         linear(arena 0, weight 0, output 0)
    y = reshape(u, (b, s, 8))               (a reshape is another view of the same place)

Sizes stay symbols: the kernels take them at run time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir import GenericConst

Extent = Any
"""A size: a TIR expression over the entry's symbols."""

Where = Literal["input", "output", "weight", "state", "arena"]


class ExportError(ValueError):
    """A program cannot become C; says which operator or tensor, and why."""


@dataclass(eq=False)
class Storage:
    """Memory of one tensor: the caller's, a weight's, or a part of the state or the arena.

    Attributes:
        index: position among the places of this kind.
    """

    where: Where
    index: int


@dataclass(frozen=True)
class View:
    """Memory seen as a tensor."""

    storage: Storage
    dtype: str
    shape: tuple[Extent, ...]


@dataclass(frozen=True)
class Call:
    """A kernel's call: tensors and sizes in the order of its parameters.

    A call of no kernel copies its first tensor to its second.
    """

    kernel: str | None
    operands: tuple[View | Extent, ...]


@dataclass
class StraightCode:
    """An entry's code.

    Attributes:
        name: the entry's.
        inputs, weights, outputs: in the order of the program.
        state: what outlives a run, see `arrange`.
        constants: values of weights past those of the program: what TVM folded.
        calls: in order.
        equal: sizes that must be the same for the code to be right, in pairs.
    """

    name: str
    inputs: list[View] = field(default_factory=list)
    weights: list[View] = field(default_factory=list)
    outputs: list[View] = field(default_factory=list)
    state: list[View] = field(default_factory=list)
    constants: list[np.ndarray] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    equal: list[tuple[Extent, Extent]] = field(default_factory=list)

    def symbols(self) -> dict[str, tirx.Var]:
        """The sizes that inputs and state bring, by name."""
        extents = [extent for view in (*self.inputs, *self.state) for extent in view.shape]
        return {extent.name: extent for extent in extents if isinstance(extent, tvm.ir.Var)}

    def arrange(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        state: Sequence[tuple[int, int | None]] = (),
    ) -> None:
        """Puts inputs and outputs in another order, given by their places in this one.

        Args:
            state: inputs that become state, each with the output that is its next value, which a
                last call copies there, or None where kernels change it in place.
        """
        given, made = self.inputs, self.outputs
        self.inputs = [given[i] for i in inputs]
        self.outputs = [made[i] for i in outputs]
        self.state = [given[i] for i, _ in state]
        free = 1 + max((s.index for s in self._storages() if s.where == "arena"), default=-1)
        returned = {id(view.storage) for view in self.outputs}
        for view in made:  # what nobody asked for, or becomes state
            if view.storage.where == "output" and id(view.storage) not in returned:
                view.storage.where, view.storage.index = "arena", free
                free += 1
        for number, (_, after) in enumerate(state):
            held = self.state[number]
            held.storage.where, held.storage.index = "state", number
            if after is None:
                continue
            value = made[after]
            if (value.dtype, *map(str, value.shape)) != (held.dtype, *map(str, held.shape)):
                raise ExportError(
                    f"entry {self.name!r}: a state of {held.dtype} {list(held.shape)} cannot "
                    f"become {value.dtype} {list(value.shape)}; its next value must be alike"
                )
            self.calls.append(Call(None, (value, held)))
        for views in (self.inputs, self.outputs):
            for index, view in enumerate(views):
                view.storage.index = index

    def _storages(self) -> Iterator[Storage]:
        for call in self.calls:
            yield from (view.storage for view in call.operands if isinstance(view, View))

    def kernels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(call.kernel for call in self.calls if call.kernel))


def straighten(module: tvm.IRModule, name: str) -> StraightCode:
    """The function ``name`` of a module after `sparsify.codegen.build.kernel_passes`.

    Raises:
        ExportError: something in it is no kernel call.
    """
    return _Walk(module[name], name).run()


class _Walk:
    def __init__(self, function: relax.Function, name: str) -> None:
        self.function = function
        self.code = StraightCode(name)
        self.known: dict[Any, Any] = {}
        """Views, tuples of them, by variable."""
        self.in_arena = 0

    def run(self) -> StraightCode:
        inputs = int(self.function.attrs["num_input"])
        for position, parameter in enumerate(self.function.params):
            given = self.code.inputs if position < inputs else self.code.weights
            where: Where = "input" if position < inputs else "weight"
            view = self._view(Storage(where, len(given)), parameter.ty)
            given.append(view)
            self.known[parameter] = view
        for block in self.function.body.blocks:
            for binding in block.bindings:
                if isinstance(binding, relax.MatchCast):
                    self.known[binding.var] = self._cast(self._operand(binding.value), binding.ty)
                else:
                    self.known[binding.var] = self._value(binding.var, binding.value)
        self._return(self._operand(self.function.body.body))
        return self.code

    def _value(self, variable: Any, value: Any) -> Any:
        if isinstance(value, relax.Call):
            operator = getattr(value.op, "name", str(value.op))
            if operator == "relax.call_tir":
                return self._call(variable, value)
            if operator == "relax.reshape":
                source = self._operand(value.args[0])
                return self._view(source.storage, variable.ty)
            raise ExportError(
                f"entry {self.code.name!r}: {operator} needs TVM's runtime, which exported C does "
                "not have; rewrite the model without the operator that it comes from"
            )
        return self._operand(value)

    def _cast(self, value: Any, type_: Any) -> Any:
        """A tensor or shape with the sizes that the graph has of it, which a run checks."""
        cast: Any
        if isinstance(value, View):
            cast = self._view(value.storage, type_)
            pairs = zip(value.shape, cast.shape, strict=True)
        else:
            cast = tuple(type_.values)
            pairs = zip(value, cast, strict=True)
        self.code.equal.extend((a, b) for a, b in pairs if str(a) != str(b))
        return cast

    def _call(self, variable: Any, call: Any) -> Any:
        kernel, given, *sizes = call.args
        operands = self._operand(given)
        types = variable.ty.fields if isinstance(variable.ty, tvm.ir.TupleType) else [variable.ty]
        results = []
        for type_ in types:
            results.append(self._view(Storage("arena", self.in_arena), type_))
            self.in_arena += 1
        extra = self._operand(sizes[0]) if sizes else ()
        self.code.calls.append(Call(kernel.name_hint, (*operands, *results, *extra)))
        return results[0] if not isinstance(variable.ty, tvm.ir.TupleType) else tuple(results)

    def _operand(self, value: Any) -> Any:
        if value in self.known:
            return self.known[value]
        if isinstance(value, GenericConst):
            return self._constant(value)
        if isinstance(value, relax.TupleGetItem):
            return self._operand(value.tuple_value)[value.index]
        if isinstance(value, tvm.ir.Tuple):
            return tuple(self._operand(part) for part in value.fields)
        if isinstance(value, relax.ShapeExpr):
            return tuple(value.values)
        if isinstance(value.ty, tvm.ir.PrimType):
            return value
        raise ExportError(
            f"entry {self.code.name!r}: {type(value).__name__} cannot be an operand of a kernel"
        )

    def _constant(self, value: Any) -> View:
        view = self._view(Storage("weight", len(self.code.weights)), value.ty)
        self.code.weights.append(view)
        self.code.constants.append(value.value.numpy())
        self.known[value] = view
        return view

    def _view(self, storage: Storage, type_: Any) -> View:
        if not isinstance(type_, relax.TensorType) or not isinstance(type_.shape, relax.ShapeExpr):
            raise ExportError(
                f"entry {self.code.name!r}: a value of type {type_} has no known shape, so no "
                "place can be planned for it"
            )
        return View(storage, str(type_.dtype), tuple(type_.shape.values))

    def _return(self, results: Any) -> None:
        """Makes results' places the caller's, or copies what cannot be: weights, inputs, twins."""
        views: Sequence[View] = results if isinstance(results, tuple) else (results,)
        for index, view in enumerate(views):
            if view.storage.where == "arena":
                view.storage.where, view.storage.index = "output", index
                self.code.outputs.append(view)
            else:
                output = View(Storage("output", index), view.dtype, view.shape)
                self.code.calls.append(Call(None, (view, output)))
                self.code.outputs.append(output)
