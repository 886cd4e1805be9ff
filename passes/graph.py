"""Reading FX graphs: operands by name, symbolic extents, users past copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import optimization_hint, statically_known_true

from sparsify.effects import written_by
from sparsify.rewriter import Rewriter

aten = torch.ops.aten
Extent = int | torch.SymInt

COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every operand of an operator call by its schema name, defaults filled in."""
    found: dict[str, Any] = {}
    schema = cast(torch._ops.OpOverload, node.target)._schema
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            found[argument.name] = node.args[position]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def operand(node: fx.Node, position: int = 0) -> Any:
    """An operand of a call, for which FX has no narrower type than any argument."""
    return node.args[position]


def shape_of(node: fx.Node) -> tuple[Extent, ...]:
    """Extents; a dynamic one that export found to have one value only is that number."""
    return tuple(map(_plain, node.meta["val"].shape))


def _plain(extent: Extent) -> Extent:
    if isinstance(extent, torch.SymInt) and extent.node.expr.is_Integer:
        return int(extent.node.expr)
    return extent


def is_tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def same(left: Extent, right: Extent) -> bool:
    """Whether two extents are equal for every input; adds no guard, unlike ``==``."""
    return statically_known_true(left == right)


def same_shape(left: Sequence[Extent], right: Sequence[Extent]) -> bool:
    return len(left) == len(right) and all(map(same, left, right))


def product(extents: Sequence[Extent]) -> Extent:
    total: Extent = 1
    for extent in extents:
        total = total * extent
    return total


def hint(extent: Extent) -> int:
    """The extent in the example inputs."""
    return extent if isinstance(extent, int) else optimization_hint(extent, fallback=1)


def sole_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads ``node``, past copies; None when there are several or none."""
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_function":
        return None
    return sole_user(users[0]) if users[0].target in COPIES else users[0]


def past_copies(node: Any) -> Any:
    """The value that ``node`` copies, through any number of copies."""
    while isinstance(node, fx.Node) and node.target in COPIES:
        node = node.args[0]
    return node


def erase_dead(rewriter: Rewriter, node: fx.Node) -> None:
    """Erases a call that nothing reads, and whatever fed it alone: dead readers mislead matches."""
    if node.op != "call_function" or node.users or node._erased or written_by(node):
        return
    operands = node.all_input_nodes
    rewriter.graph.erase_node(node)
    for operand in operands:
        erase_dead(rewriter, operand)
