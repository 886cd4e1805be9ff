"""One linear in place of several that share an input: what merging passes have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify.passes.graph import arguments, aten, shape_of
from sparsify.passes.sites import is_disabled, merged_name, named_weight, site_name
from sparsify.rewriter import Rewriter


@dataclass(frozen=True)
class Merged:
    """A linear whose rows are those of several, one after the other.

    Attributes:
        starts: the row at which each of the former linears begins.
    """

    node: fx.Node
    site: str
    starts: dict[fx.Node, int]
    shape: tuple[int, int]


def is_linear(rewriter: Rewriter, node: fx.Node) -> bool:
    """Whether a node is a linear with a constant matrix and bias."""
    if node.target != aten.linear.default:
        return False
    operands = arguments(node)
    bias = operands["bias"]
    return (
        rewriter.weight_of(operands["weight"]) is not None
        and len(shape_of(operands["weight"])) == 2
        and (bias is None or rewriter.weight_of(bias) is not None)
    )


def is_off(rewriter: Rewriter, linear: fx.Node, patterns: Iterable[str]) -> bool:
    """Whether the caller switched the site of a linear off."""
    name, _ = named_weight(rewriter, arguments(linear)["weight"])
    return is_disabled(site_name(name), patterns)


def merge(rewriter: Rewriter, linears: Sequence[fx.Node]) -> Merged:
    """Inserts the merged linear before the first of those it replaces.

    A missing bias is filled with zeros when another has one.
    """
    operands = [arguments(linear) for linear in linears]
    names, weights = zip(*(named_weight(rewriter, o["weight"]) for o in operands), strict=True)
    name = merged_name(names)
    site = site_name(name)
    weight = rewriter.add_weight(name, torch.cat(weights))
    bias = _merged_bias(rewriter, operands, weights, site)
    with rewriter.graph.inserting_before(min(linears)):
        node = rewriter.call(aten.linear.default, (operands[0]["input"], weight, bias))
    starts, row = {}, 0
    for linear, matrix in zip(linears, weights, strict=True):
        starts[linear] = row
        row += matrix.shape[0]
    return Merged(node, site, starts, (row, weights[0].shape[1]))


def _merged_bias(
    rewriter: Rewriter, operands: list[dict[str, Any]], weights: Sequence[torch.Tensor], site: str
) -> fx.Node | None:
    biases = [rewriter.weight_of(o["bias"]) for o in operands]
    if all(bias is None for bias in biases):
        return None
    filled = [
        weight.new_zeros(weight.shape[0]) if bias is None else bias
        for bias, weight in zip(biases, weights, strict=True)
    ]
    return rewriter.add_weight(f"{site}.bias", torch.cat(filled))
