"""How a compiled model is called: arguments to tensors, checked, and tensors to results."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree
from torch.utils._sympy.value_ranges import ValueRanges

from sparsify.arguments import (
    ConstantInput,
    TensorInput,
    check_constant,
    check_kind,
    check_state,
    inputs_of,
    plain,
)

Sizes = dict[sympy.Symbol, int]


class CallSignature:
    """The arguments of a program, by the names and the structure of the module's ``forward``.

    Args:
        parameters: names of ``forward``'s positional parameters in order, so that arguments mean
            the same by position; those that the example inputs left out may only be None.
    """

    def __init__(self, exported: ExportedProgram, parameters: Sequence[str] = ()) -> None:
        spec = exported.call_spec
        assert spec.in_spec is not None and spec.out_spec is not None
        positional, named = spec.in_spec.children()
        names = list(exported.module_call_graph[0].signature.forward_arg_names or ())
        names = names[: positional.num_children]
        names += [f"argument {i}" for i in range(len(names), positional.num_children)]
        keywords = list(named.context)
        self.arguments = dict(
            zip((*names, *keywords), (*positional.children(), *named.children()), strict=True)
        )
        self.parameters = tuple(parameters) or (*names, *keywords)
        self.out_spec = spec.out_spec
        self.ranges = dict(exported.range_constraints)
        self.inputs = inputs_of(exported, self.arguments)
        self.tensors = tuple(i for i in self.inputs if isinstance(i, TensorInput))
        self._binders: dict[sympy.Symbol, str] = {}
        for wanted in self.inputs:
            for dim, size in enumerate(getattr(wanted, "shape", ())):
                if isinstance(size, sympy.Symbol):
                    self._binders.setdefault(size, f"dim {dim} of {wanted.name!r}")

    def __str__(self) -> str:
        return f"({', '.join(self.arguments)})"

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[torch.Tensor], Sizes]:
        """The tensors in the order of the program's inputs, and the sizes that they fix.

        Raises:
            TypeError: a missing, unknown or repeated argument, a wrong type, structure or dtype.
            ValueError: a wrong shape, size, device or constant, or state that kernels cannot
                change where it lies.
        """
        given = self._named(args, kwargs)
        leaves: list[Any] = []
        for name, spec in self.arguments.items():
            leaves.extend(_leaves(name, given[name], spec))
        tensors: list[torch.Tensor] = []
        sizes: Sizes = {}
        derived: list[tuple[TensorInput, torch.Tensor]] = []
        for wanted, value in zip(self.inputs, leaves, strict=True):
            if isinstance(wanted, ConstantInput):
                check_constant(wanted, value)
                continue
            check_kind(wanted, value)
            if not self._bind_shape(wanted, value, sizes):
                derived.append((wanted, value))
            tensors.append(value if wanted.state else plain(value))
        for wanted, value in derived:
            self._check_derived(wanted, value, sizes)
        check_state(self.tensors, tensors)
        for symbol, size in sizes.items():
            self._check_range(symbol, size)
        return tensors, sizes

    def results(self, values: list[Any]) -> Any:
        """The outputs in the structure that the module returns."""
        return _pytree.tree_unflatten(values, self.out_spec)

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if len(args) > len(self.parameters):
            raise TypeError(
                f"takes {len(self.parameters)} arguments {self}, {len(args)} were given"
            )
        given = dict(zip(self.parameters, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise TypeError(f"argument {name!r} was given twice, by position and by name")
            given[name] = value
        for name, value in given.items():
            if name not in self.arguments and value is not None:
                raise TypeError(
                    f"argument {name!r} was not among the example inputs {self}; compile with an "
                    "example of it"
                )
        for name in self.arguments:
            if name not in given:
                raise TypeError(f"argument {name!r} is missing; the model takes {self}")
        return given

    def _bind_shape(self, wanted: TensorInput, value: torch.Tensor, sizes: Sizes) -> bool:
        """Compares a shape with what is wanted; False when it has sizes to check at the end."""
        shape = value.shape
        if len(shape) != len(wanted.shape):
            raise ValueError(
                f"argument {wanted.name!r} has shape {tuple(shape)} with {len(shape)} dims; the "
                f"model takes {len(wanted.shape)}: {_shape_text(wanted)}"
            )
        complete = True
        for dim, (size, found) in enumerate(zip(wanted.shape, shape, strict=True)):
            if isinstance(size, int):
                if found != size:
                    raise ValueError(
                        f"argument {wanted.name!r} has shape {tuple(shape)}: dim {dim} is {found}, "
                        f"the model was compiled for {size}; compile with dynamic_shapes that let "
                        "it vary, or give it that size"
                    )
            elif isinstance(size, sympy.Symbol):
                if sizes.setdefault(size, found) != found:
                    raise ValueError(
                        f"argument {wanted.name!r} has shape {tuple(shape)}: dim {dim} is {found}, "
                        f"but {self._binders[size]} is {sizes[size]}, and they must be equal"
                    )
            else:
                complete = False
        return complete

    def _check_derived(self, wanted: TensorInput, value: torch.Tensor, sizes: Sizes) -> None:
        for dim, size in enumerate(wanted.shape):
            if isinstance(size, int | sympy.Symbol):
                continue
            found = value.shape[dim]
            unknown = size.free_symbols - sizes.keys()
            for symbol in unknown:
                solutions = sympy.solve(size.subs(sizes) - found, symbol)
                if len(unknown) == 1 and len(solutions) == 1 and solutions[0].is_Integer:
                    sizes[symbol] = int(solutions[0])
            if size.free_symbols - sizes.keys() or int(size.subs(sizes)) != found:
                known = ", ".join(f"{s} = {sizes[s]}" for s in size.free_symbols if s in sizes)
                raise ValueError(
                    f"argument {wanted.name!r} has shape {tuple(value.shape)}: dim {dim} is "
                    f"{found}, it must be {size}" + (f" with {known}" if known else "")
                )

    def _check_range(self, symbol: sympy.Symbol, size: int) -> None:
        allowed = self.ranges.get(symbol)
        if isinstance(allowed, ValueRanges) and not allowed.lower <= size <= allowed.upper:
            where = self._binders.get(symbol, str(symbol))
            raise ValueError(
                f"{where} is {size}; the model was compiled for {allowed.lower} to {allowed.upper}"
            )


def parameters_of(model: Any, exported: ExportedProgram) -> tuple[str, ...]:
    """The names of a module's positional parameters, those of ``*args`` as export names them."""
    if not isinstance(model, torch.nn.Module):
        return ()
    spec = exported.call_spec.in_spec
    assert spec is not None
    count = spec.child(0).num_children
    positional = list(exported.module_call_graph[0].signature.forward_arg_names or ())[:count]
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind == parameter.VAR_POSITIONAL:
            names += positional[len(names) :]
            break
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return tuple(names)


def _leaves(name: str, value: Any, spec: _pytree.TreeSpec) -> list[Any]:
    if spec.is_leaf():
        return [value]
    if spec.type is dict and isinstance(value, dict) and value.keys() == set(spec.context):
        value = {key: value[key] for key in spec.context}
    leaves, found = _pytree.tree_flatten(value)
    if found != spec:
        raise TypeError(
            f"argument {name!r} has another structure than its example: {found} instead of {spec}"
        )
    return leaves


def _shape_text(wanted: TensorInput) -> str:
    return f"({', '.join(map(str, wanted.shape))})"
