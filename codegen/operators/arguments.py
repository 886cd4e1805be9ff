"""What converters share: operands, extents, and conversions to lanes and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from tvm import tirx

from sparsify.codegen.kernels.cpu.lanes import FromLanes, ToLanes
from sparsify.layouts import LANES

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names of the operator's schema, defaults filled in."""
    names: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            names[argument.name] = node.args[i]
        else:
            names[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return names


def shape_of(value: Any) -> list[Any]:
    """The extents of a Relax tensor."""
    return list(value.ty.shape.values)


def product(extents: Sequence[Any]) -> Any:
    total = tirx.IntImm("int64", 1)
    for extent in extents:
        total = total * extent
    return total


def lane_groups(tokens: Any) -> Any:
    return tirx.floordiv(tokens + (LANES - 1), LANES)


def to_lanes(lowering: Lowering, x: Any, groups: int | torch.SymInt | None = None) -> Any:
    *leading, features = shape_of(x)
    tokens = product(leading)
    count = lane_groups(tokens) if groups is None else lowering.extent(groups)
    rows = lowering.reshape(x, (tokens, features))
    kernel = ToLanes(lowering.target.isa, int(features))
    return lowering.call_kernel(kernel, [rows], (count, features, LANES))


def from_lanes(lowering: Lowering, x: Any, leading: Sequence[Any]) -> Any:
    features = shape_of(x)[1]
    kernel = FromLanes(lowering.target.isa, int(features))
    rows = lowering.call_kernel(kernel, [x], (product(leading), features))
    return lowering.reshape(rows, (*leading, features))


def extents_of(lowering: Lowering, values: Sequence[Any]) -> list[Any]:
    return [lowering.extent(v.meta["val"] if isinstance(v, fx.Node) else v) for v in values]


def flat(lowering: Lowering, x: Any) -> Any:
    """``[..., features]`` as ``[tokens, features]``."""
    *leading, features = shape_of(x)
    return lowering.reshape(x, (product(leading), features))
