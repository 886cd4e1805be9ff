"""What exporters make of experts, recognised node by node.

transformers computes experts in two ways that torch.export can trace, each with the products of a
token and a slot as a row: by a batched product with the weights gathered for each row, or by a
grouped product of rows sorted by expert.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from sparsify.passes.elementwise import activation_of
from sparsify.passes.graph import arguments, aten, past_copies, shape_of

GROUPED = "transformers::grouped_mm_fallback"
"""The operator that transformers registers for grouped products, by name: it may not be there."""

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class ExpertsMatch:
    """Experts: operands as the operator ``experts`` takes them, weights ``[count, rows, columns]``.

    Attributes:
        result: the node that holds ``[tokens, out_features]``.
    """

    result: fx.Node
    x: fx.Node
    experts: fx.Node
    weights: fx.Node
    up: fx.Node
    down: fx.Node
    activation: str
    gated: bool


def operands(node: Any, *targets: Any) -> tuple[Any, ...] | None:
    """The positional operands of a call of one of the targets, past copies of it; else None."""
    node = past_copies(node)
    if not isinstance(node, fx.Node) or node.target not in targets:
        return None
    return tuple(arguments(node).values()) if hasattr(node.target, "_schema") else node.args


def part_of(node: Any, index: int) -> fx.Node | None:
    """The call of which a node takes the result of this index."""
    node = past_copies(node)
    if not isinstance(node, fx.Node) or node.target != operator.getitem or node.args[1] != index:
        return None
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def viewed(node: Any) -> Any:
    """The value before views and copies."""
    node = past_copies(node)
    while isinstance(node, fx.Node) and node.target in _VIEWS:
        node = past_copies(node.args[0])
    return node


def match_experts(node: fx.Node) -> ExpertsMatch | None:
    """Experts in one of the two ways, from the sum over a token's slots."""
    found = operands(node, aten.sum.dim_IntList)
    if found is None or node.target != aten.sum.dim_IntList or list(found[1]) != [1] or found[2]:
        return None
    rows = found[0]
    if len(shape_of(rows)) != 3:
        return None
    return _batched(node, viewed(rows)) or _grouped(node, viewed(rows))


def _batched(node: fx.Node, weighted: Any) -> ExpertsMatch | None:
    product = _weighted(weighted)
    if product is None:
        return None
    made, weights = product
    second = _batched_linear(made)
    if second is None:
        return None
    hidden, down, ids = second
    inner = inner_of(hidden)
    first = None if inner is None else _batched_linear(inner[0])
    if inner is None or first is None or first[2] is not ids:
        return None
    repeated = operands(viewed(first[0]), aten.expand.default)
    column = None if repeated is None else operands(repeated[0], aten.unsqueeze.default)
    if column is None or column[1] != 1:
        return None
    return ExpertsMatch(node, column[0], viewed(ids), viewed(weights), first[1], down, *inner[1:])


def _weighted(node: Any) -> tuple[Any, Any] | None:
    """The rows and the weights of a product of rows with a column."""
    found = operands(node, aten.mul.Tensor)
    for row, column in () if found is None else (found[:2], found[1::-1]):
        inner = operands(column, aten.unsqueeze.default)
        if inner is not None and inner[1] in (-1, 1):
            return row, inner[0]
    return None


def _batched_linear(node: Any) -> tuple[Any, fx.Node, Any] | None:
    """``(rows, weights, the expert of each row)`` of a product with gathered weights."""
    squeezed = operands(node, aten.squeeze.dims, aten.squeeze.dim)
    bmm = None if squeezed is None else operands(squeezed[0], aten.bmm.default)
    if bmm is None:
        return None
    gathered = operands(bmm[0], aten.index.Tensor)
    column = operands(bmm[1], aten.unsqueeze.default)
    if gathered is None or column is None or column[1] not in (-1, 2) or len(gathered[1]) != 1:
        return None
    return column[0], gathered[0], past_copies(gathered[1][0])


def inner_of(hidden: Any) -> tuple[fx.Node, str, bool] | None:
    """What an expert's second projection takes: its first, the activation, whether it is gated."""
    hidden = past_copies(hidden)
    activation = activation_of(hidden)
    if activation is not None:
        return past_copies(hidden.args[0]), activation, False
    product = operands(hidden, aten.mul.Tensor)
    for opened, up in () if product is None else (product[:2], product[1::-1]):
        opened = past_copies(opened)
        activation = activation_of(opened)
        if opened is None or activation is None:
            continue
        halves = part_of(opened.args[0], 0)
        if halves is not None and _in_halves(halves) and part_of(up, 1) == halves:
            return past_copies(halves.args[0]), activation, True
    return None


def _in_halves(node: fx.Node) -> bool:
    """Whether a call parts the features in two halves."""
    if node.target not in (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default):
        return False
    values: Sequence[Any] = node.meta["val"]
    rank = len(values[0].shape)
    dim = arguments(node)["dim"] % rank
    return len(values) == 2 and dim == rank - 1 and values[0].shape[-1] == values[1].shape[-1]


def _grouped(node: fx.Node, restored: Any) -> ExpertsMatch | None:
    back = operands(restored, aten.index.Tensor)
    product = None if back is None else _weighted(back[0])
    if back is None or product is None or len(back[1]) != 1:
        return None
    made, picked = product
    second = _grouped_linear(made)
    inner = None if second is None else inner_of(second[0])
    first = None if inner is None else _grouped_linear(inner[0])
    if second is None or inner is None or first is None or first[2] is not second[2]:
        return None
    rows = operands(first[0], aten.index.Tensor)
    weights = operands(picked, aten.index.Tensor)
    if rows is None or weights is None:
        return None
    order = past_copies(weights[1][0])
    sort = part_of(order, 1)
    slots = shape_of(node.args[0])[1]
    if (
        sort is None
        or not _is_floor(rows[1][0], order, slots)
        or not _is_inverse(back[1][0], order)
        or not _is_bounds(first[2], sort)
    ):
        return None
    ids = arguments(sort)["self"]
    return ExpertsMatch(
        node, rows[0], viewed(ids), viewed(weights[0]), first[1], second[1], *inner[1:]
    )


def _grouped_linear(node: Any) -> tuple[Any, fx.Node, Any] | None:
    """``(rows, weights, where each expert's rows end)``."""
    node = past_copies(node)
    schema = getattr(getattr(node, "target", None), "_schema", None)
    if schema is None or schema.name != GROUPED:
        return None
    turned = operands(node.args[1], aten.permute.default)
    if turned is None or list(turned[1]) != [0, 2, 1]:
        return None
    return node.args[0], turned[0], past_copies(node.args[2])


def _is_floor(node: Any, order: Any, slots: Any) -> bool:
    """Whether it is the token of each sorted pair."""
    found = operands(node, aten.div.Tensor_mode, aten.floor_divide.default)
    if found is None or past_copies(found[0]) is not order or found[1] != slots:
        return False
    return len(found) == 2 or found[2] == "floor"


def _is_inverse(node: Any, order: Any) -> bool:
    """Whether it is the inverse of a permutation: ``inverse[order] = 0, 1, 2 ...``."""
    found = operands(node, aten.index_put.default)
    if found is None or len(found[1]) != 1 or past_copies(found[1][0]) is not order:
        return False
    numbers = operands(found[2], aten.arange.default, aten.arange.start, aten.arange.start_step)
    return numbers is not None and not found[3]


def _is_bounds(node: Any, sort: fx.Node) -> bool:
    """Whether it is a running count of each expert's sorted pairs."""
    total = operands(node, aten.cumsum.default)
    counts = None if total is None else operands(total[0], aten.histc.default)
    if counts is None:
        return False
    values, bins, least, most = counts
    source = operands(values, aten._to_copy.default)
    named = part_of(values if source is None else source[0], 0)
    return named is sort and least == 0 and most == bins - 1
