"""Experts of which all see every token, scaled by what it counts for them, as Llama 4 has them.

    scores [tokens, count]: 0 where an expert is not chosen
    x -> repeat count times -> * scores -> bmm Wu -> silu(gate) * up -> bmm Wd -> sum over experts

The weight is on the way in, not on the way out, and the two differ: an expert is not linear. What
an expert makes of zeros is zero, so those that are not chosen need not be computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify.ops import ACTIVATIONS
from sparsify.passes.graph import arguments, aten, past_copies, shape_of
from sparsify.passes.moe_patterns import inner_of, operands, viewed
from sparsify.rewriter import Rewriter

_PRODUCTS = (aten.bmm.default, aten.matmul.default)


@dataclass(frozen=True)
class ScaledMatch:
    """Experts with scaled inputs.

    Attributes:
        result: the node that holds ``[tokens, out_features]``.
        x: ``[tokens, in_features]``.
        scores: ``[tokens, count]``.
        up, down: weights ``[count, columns, rows]``, the other way round than the operator's.
    """

    result: fx.Node
    x: fx.Node
    scores: fx.Node
    up: fx.Node
    down: fx.Node
    activation: str
    gated: bool


def match_scaled(node: fx.Node) -> ScaledMatch | None:
    """Experts with scaled inputs, from the sum over all of them."""
    if node.target != aten.sum.dim_IntList:
        return None
    options = arguments(node)
    second = operands(viewed(options["self"]), *_PRODUCTS)
    if second is None or list(options["dim"]) != [0] or options["keepdim"]:
        return None
    inner = inner_of(second[0])
    first = None if inner is None else operands(inner[0], *_PRODUCTS)
    if inner is None or first is None or not _keeps_zero(inner[1]):
        return None
    product = operands(viewed(first[0]), aten.mul.Tensor)
    for rows, column in () if product is None else (product[:2], product[1::-1]):
        x, scores = _repeated(rows), _turned(column)
        if x is not None and scores is not None and shape_of(scores)[1] == shape_of(first[1])[0]:
            return ScaledMatch(node, x, scores, first[1], second[1], *inner[1:])
    return None


def pairs(
    rewriter: Rewriter, x: fx.Node, experts: fx.Node, weights: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Tokens, experts and weights of experts that take ``weight * x``, each slot a token.

    Returns:
        ``[tokens * slots, in_features]``, and ``[tokens * slots, 1]`` twice, the weights all 1.
    """
    slots, features = shape_of(experts)[1], shape_of(x)[1]
    if slots == 1:
        scaled = rewriter.call(aten.mul.Tensor, (x, weights))
    else:
        row = rewriter.call(aten.unsqueeze.default, (x, 1))
        column = rewriter.call(aten.unsqueeze.default, (weights, 2))
        each = rewriter.call(aten.mul.Tensor, (row, column))
        scaled = rewriter.call(aten.reshape.default, (each, [-1, features]))
        experts = rewriter.call(aten.reshape.default, (experts, [-1, 1]))
        weights = rewriter.call(aten.reshape.default, (weights, [-1, 1]))
    return scaled, experts, rewriter.call(aten.full_like.default, (weights, 1.0))


def _keeps_zero(activation: str) -> bool:
    return not ACTIVATIONS[activation](torch.zeros(1)).any()


def _repeated(node: Any) -> fx.Node | None:
    """The rows that are there once for each expert, one run after the other."""
    node = viewed(node)
    repeat = operands(node, aten.repeat.default)
    if repeat is not None and len(shape_of(node)) == 2:
        return past_copies(repeat[0]) if repeat[1][1] == 1 else None
    broadcast = operands(node, aten.unsqueeze.default)
    if broadcast is not None and len(shape_of(node)) == 3 and broadcast[1] == 0:
        return past_copies(broadcast[0])
    return None


def _turned(node: Any) -> fx.Node | None:
    """The scores ``[tokens, count]`` of a column of them, expert by expert."""
    node = viewed(node)
    column = operands(node, aten.unsqueeze.default)
    if column is not None and column[1] in (-1, 2):
        node = viewed(column[0])
    turned = operands(node, aten.permute.default)
    return past_copies(turned[0]) if turned is not None and list(turned[1]) == [1, 0] else None
