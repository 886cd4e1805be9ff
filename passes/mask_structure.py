"""What an attention mask is made of: a band of positions, and what remains of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from sparsify.passes.graph import (
    arguments,
    aten,
    is_tensor,
    past_copies,
    same,
    same_shape,
    shape_of,
)
from sparsify.passes.iota import AND, NOT, constant, is_bool
from sparsify.passes.positions import Region, corner_of_weight, keeps_plane, region, stored
from sparsify.rewriter import Rewriter

ABSORBING = -3e38
"""A fill in float32 beside which a score is nothing, so that what it is added to is hidden."""


@dataclass(frozen=True)
class MaskStructure:
    """A mask as ``causal``, ``window`` and ``sinks`` of `Band`, and a mask of what they leave.

    Attributes:
        mask: bool or float, four-dimensional; None when the band is all there is.
        found: what was read, or why nothing was, in words.
    """

    causal: bool
    window: int
    sinks: int
    mask: fx.Node | None
    found: str


NO_MASK = MaskStructure(False, 0, 0, None, "")


@dataclass(frozen=True)
class _Term:
    """A part of a conjunction (of bool masks) or sum (of float ones)."""

    node: fx.Node
    region: Region | None
    soft: bool = False
    """Whether it hides by the largest negative number, which is no minus infinity."""


def structure(rewriter: Rewriter, mask: fx.Node) -> MaskStructure:
    """Takes a mask apart; new nodes go to the graph's insertion point."""
    terms = list(_terms(rewriter, mask))
    seen, rest = Region(), []
    for term in terms:
        both = None if term.region is None else seen.meet(term.region)
        if both is None or (term.soft and _may_blind(term.region, terms, mask)):
            rest.append(term)
        else:
            seen = both
    causal, window, sinks = seen.band
    if not causal and not window:
        return MaskStructure(False, 0, 0, four_dimensional(rewriter, mask), _why(mask, terms))
    words = _words(causal, window, sinks)
    apart = len({is_bool(term.node) for term in rest}) < 2 and not any(t.soft for t in rest)
    if not seen.is_band or not apart:
        whole = four_dimensional(rewriter, mask)
        return MaskStructure(causal, window, sinks, whole, f"within {words}, a mask")
    if not rest:
        return MaskStructure(causal, window, sinks, None, words)
    left = four_dimensional(rewriter, _joined(rewriter, [term.node for term in rest]))
    kind = "a mask of keys" if same(shape_of(left)[-2], 1) else "a mask"
    return MaskStructure(causal, window, sinks, left, f"{words}, and {kind} besides")


def four_dimensional(rewriter: Rewriter, mask: fx.Node) -> fx.Node:
    """Broadcasting aligns the last dims, so leading ones are 1."""
    while len(shape_of(mask)) < 4:
        mask = rewriter.call(aten.unsqueeze.default, (mask, 0))
    return mask


def _terms(rewriter: Rewriter, node: fx.Node) -> Iterator[_Term]:
    node = past_copies(node)
    if is_bool(node):
        yield from _bool_terms(rewriter, node)
    elif node.target == aten.where.self:
        yield from _filled(rewriter, node)
    elif node.target == aten.add.Tensor and arguments(node)["alpha"] == 1:
        for part in node.args[:2]:
            if is_tensor(part):
                yield from _terms(rewriter, part)
    elif keeps_plane(node):
        yield from _placed(rewriter, node, _terms(rewriter, node.args[0]))
    elif node.target in (aten.triu.default, aten.tril.default):
        yield _cut(rewriter, node)
    elif constant(rewriter, node) == 0:
        return
    else:
        weight = corner_of_weight(rewriter, node)
        yield _Term(node, None if weight is None else stored(weight))


def _bool_terms(rewriter: Rewriter, node: fx.Node) -> Iterator[_Term]:
    """The parts of a conjunction."""
    found = region(rewriter, node)
    if found is not None:
        if not found.is_all:
            yield _Term(node, found)
    elif node.target in AND:
        for part in node.args[:2]:
            yield from _bool_terms(rewriter, part)
    elif keeps_plane(node) and node.args[0].target in AND:
        yield from _placed(rewriter, node, _bool_terms(rewriter, node.args[0]))
    else:
        yield _Term(node, None)


def _placed(rewriter: Rewriter, node: fx.Node, terms: Iterator[_Term]) -> Iterator[_Term]:
    """Terms of the operand of a node that moves its leading dims, moved likewise."""
    rank = len(shape_of(node.args[0]))
    for term in terms:
        if term.region is not None or same_shape(shape_of(term.node), shape_of(node)[-rank:]):
            yield term
        elif node.target == aten.unsqueeze.default and len(shape_of(term.node)) == rank:
            moved = rewriter.call(aten.unsqueeze.default, (term.node, node.args[1]))
            yield replace(term, node=moved)
        else:
            yield _Term(node, None)


def _filled(rewriter: Rewriter, node: fx.Node) -> Iterator[_Term]:
    """``where(seen, 0, fill)``: bool terms, if the fill hides and nothing else is in it."""
    condition, *sides = node.args
    values = [constant(rewriter, side) for side in sides]
    fill = next((v for v in values if v is not None and v <= ABSORBING), None)
    if fill is None or 0 not in values:
        yield _Term(node, None)
        return
    soft = fill != float("-inf")
    if values[0] == fill:
        hidden = past_copies(condition)
        inner = hidden.args[0] if hidden.target in NOT else None
        condition = inner or rewriter.call(aten.logical_not.default, (hidden,))
    terms = list(_bool_terms(rewriter, condition))
    if soft and any(term.region is None for term in terms):
        # What keys the largest negative number hides stays added: a bool mask gives zeros where
        # no key is seen, the number the mean of all values.
        yield _Term(node, None, soft)
        return
    for term in terms:
        yield replace(term, soft=soft)


def _cut(rewriter: Rewriter, node: fx.Node) -> _Term:
    """``triu(full(-inf), d)``: hidden from the diagonal on, as in nn.Transformer's mask."""
    fill = constant(rewriter, node.args[0])
    if fill is None or fill > ABSORBING:
        return _Term(node, None)
    cut = -arguments(node)["diagonal"]
    shown = Region(low=cut + 1) if node.target == aten.triu.default else Region(high=cut - 1)
    return _Term(node, shown, fill != float("-inf"))


def _may_blind(seen: Region | None, terms: list[_Term], mask: fx.Node) -> bool:
    """Whether a query may see no key: then a soft mask gives the mean of all values, not zeros."""
    if seen is None or any(term.region is None or not term.soft for term in terms):
        return True
    if seen.prefix is not None or (seen.low or 0) > 0 or (seen.high or 0) < 0:
        return True
    one_sided = seen.high is None and not seen.chunk
    return not one_sided and not same(shape_of(mask)[-1], shape_of(mask)[-2])


def _joined(rewriter: Rewriter, nodes: list[fx.Node]) -> fx.Node:
    joined = nodes[0]
    for node in nodes[1:]:
        both = is_bool(joined) and is_bool(node)
        joined = rewriter.call(aten.bitwise_and.Tensor if both else aten.add.Tensor, (joined, node))
    return joined


def _words(causal: bool, window: int, sinks: int) -> str:
    words = "causal" if causal else ""
    if window:
        words += f"{' ' * causal}in a window of {window} positions"
    if sinks:
        words += f" and the first {sinks}"
    return words


def _why(mask: fx.Node, terms: list[_Term]) -> str:
    """Why no band was read."""
    if same(shape_of(mask)[-2], 1):
        return "the mask hides keys, the same for all queries"
    positional = [term.region for term in terms if term.region is not None]
    if any(term.soft for term in terms):
        return (
            "the mask adds a large number, and a query that sees no key would see them all: "
            "hide by minus infinity or a bool mask to have blocks skipped"
        )
    if positional:
        return f"no window around the query: {positional[0]}"
    term = terms[0].node if terms else mask
    what = str(term.target) if term.op == "call_function" else "an input"
    dtype = term.meta["val"].dtype
    if dtype != torch.bool:
        return f"the mask is added ({dtype}) and {what} does not tell what it hides"
    return f"the mask differs between queries and {what} does not tell how"
