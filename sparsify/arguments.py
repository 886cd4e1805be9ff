"""What the arguments of a program must be, and what is checked about each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument
from torch.utils import _pytree

from sparsify.effects import is_written
from sparsify.memory import ALIGNMENT, in_place, overlap

Size: TypeAlias = int | sympy.Expr


@dataclass(frozen=True)
class TensorInput:
    """What one tensor argument must be; sizes are numbers or expressions over symbols.

    Attributes:
        state: the program changes the caller's tensor in place.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[Size, ...]
    state: bool = False


@dataclass(frozen=True)
class ConstantInput:
    """An argument whose value was fixed when the model was exported."""

    name: str
    value: Any


def inputs_of(
    exported: ExportedProgram, arguments: Mapping[str, _pytree.TreeSpec]
) -> tuple[TensorInput | ConstantInput, ...]:
    """The leaves of the arguments, in the order of the program's inputs.

    Args:
        arguments: the structure of each, by name.
    """
    labels = [
        name if spec.is_leaf() else f"{name}[{i}]"
        for name, spec in arguments.items()
        for i in range(spec.num_leaves)
    ]
    specs = exported.graph_signature.input_specs
    given = [spec.arg for spec in specs if spec.kind == InputKind.USER_INPUT]
    nodes = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    inputs: list[TensorInput | ConstantInput] = []
    for label, argument in zip(labels, given, strict=True):
        if isinstance(argument, ConstantArgument):
            inputs.append(ConstantInput(label, argument.value))
        elif isinstance(argument, TensorArgument):
            value = nodes[argument.name].meta["val"]
            sizes = (s if isinstance(s, int) else s.node.expr for s in value.shape)
            fixed = tuple(int(s) if getattr(s, "is_Integer", False) else s for s in sizes)
            state = is_written(nodes[argument.name])
            inputs.append(TensorInput(label, value.dtype, fixed, state))
        else:
            raise ValueError(
                f"argument {label!r} is a number that may vary ({type(argument).__name__}); pass "
                "it as a tensor, or export the model with it fixed"
            )
    return tuple(inputs)


def check_constant(wanted: ConstantInput, value: Any) -> None:
    same = type(value) is type(wanted.value) and value == wanted.value
    if not same:
        raise ValueError(
            f"argument {wanted.name!r} is {value!r}, but it was {wanted.value!r} in the example "
            "inputs and is fixed in the compiled model; compile again with this value"
        )


def check_kind(wanted: TensorInput, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"argument {wanted.name!r} is {type(value).__name__}, the model takes a torch.Tensor "
            f"of {wanted.dtype}; convert it with torch.as_tensor"
        )
    if value.dtype != wanted.dtype:
        raise TypeError(
            f"argument {wanted.name!r} of shape {tuple(value.shape)} is {value.dtype}, the model "
            f"takes {wanted.dtype}; convert it with .to({wanted.dtype})"
        )
    if value.device.type != "cpu":
        raise ValueError(
            f"argument {wanted.name!r} of shape {tuple(value.shape)} is on device {value.device}, "
            "the model runs on the CPU; call .cpu() first"
        )
    if value.layout != torch.strided:
        raise ValueError(
            f"argument {wanted.name!r} of shape {tuple(value.shape)} is stored as {value.layout}; "
            "call .to_dense() first"
        )


def check_state(wanted: Sequence[TensorInput], tensors: Sequence[torch.Tensor]) -> None:
    """A copy would take the place of the caller's tensor: state that needs one is refused."""
    for i, (changed, state) in enumerate(zip(wanted, tensors, strict=True)):
        if not changed.state:
            continue
        what = f"argument {changed.name!r} of shape {tuple(state.shape)} is changed in place"
        reason = _unfit_state(state)
        if reason is not None:
            raise ValueError(f"{what}, and {reason}")
        for j, other in enumerate(tensors):
            if i != j and overlap(state, other):
                raise ValueError(
                    f"{what}, but shares memory with argument {wanted[j].name!r}; pass tensors "
                    "that lie apart"
                )


def _unfit_state(tensor: torch.Tensor) -> str | None:
    """Why kernels cannot change a tensor where it lies, and what to do; None when they can."""
    advice = "make it by torch.zeros and pass the whole of it"
    if tensor.requires_grad:
        return "autograd watches it; pass its .detach()"
    if not tensor.is_contiguous() or tensor.is_neg():
        return f"it is not contiguous (strides {tensor.stride()}); {advice}"
    if not in_place(tensor):
        return f"it begins at an address that is no multiple of {ALIGNMENT} bytes; {advice}"
    return None


def plain(value: torch.Tensor) -> torch.Tensor:
    """Without autograd and lazy negation, which kernels do not see."""
    if value.requires_grad:
        value = value.detach()
    return value.resolve_neg() if value.is_neg() else value
