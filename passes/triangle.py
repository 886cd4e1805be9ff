"""Reading mask code: triangles, ``key - query <= d`` in any of its spellings."""

from __future__ import annotations

import torch
from torch import fx

from sparsify.passes.graph import COPIES, arguments, aten, same, shape_of
from sparsify.passes.iota import COMPARISONS, FLIPPED, NOT, constant, iota, is_bool
from sparsify.rewriter import Rewriter

_NEGATED = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le", "eq": "ne", "ne": "eq"}
_LARGEST_TRIANGLE = 1 << 26
"""Elements of a stored mask that are still compared with a triangle."""


def diagonal(rewriter: Rewriter, node: object) -> int | None:
    """d if a bool mask is ``key - query <= d`` over its last two dims, None when it is not."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if not is_bool(node) or node.meta["val"].dim() < 2:
        return None
    weight = rewriter.weight_of(node)
    if weight is not None:
        return 0 if _is_triangle(weight) else None
    if node.op != "call_function":
        return None
    if node.target == aten.tril.default and constant(rewriter, node.args[0]) is True:
        return arguments(node)["diagonal"]
    if node.target in COMPARISONS:
        return _diagonal_of(rewriter, COMPARISONS[node.target], *node.args[:2])
    if node.target in NOT and node.args[0].target in COMPARISONS:
        inner = node.args[0]
        return _diagonal_of(rewriter, _NEGATED[COMPARISONS[inner.target]], *inner.args[:2])
    if node.target == aten.slice.Tensor:
        start_is_first = arguments(node)["start"] in (None, 0) and arguments(node)["step"] == 1
        return diagonal(rewriter, node.args[0]) if start_is_first else None
    same_plane = (*COPIES, aten.expand.default, aten.unsqueeze.default, aten.view.default)
    if node.target not in same_plane or node.args[0].meta["val"].dim() < 2:
        return None
    before, after = shape_of(node.args[0]), shape_of(node)
    if not all(same(a, b) for a, b in zip(before[-2:], after[-2:], strict=True)):
        return None
    return diagonal(rewriter, node.args[0])


def _diagonal_of(rewriter: Rewriter, name: str, left: object, right: object) -> int | None:
    key, query = iota(rewriter, left), iota(rewriter, right)
    if key is None or query is None or name not in FLIPPED:
        return None
    if key.dim == -2:
        key, query, name = query, key, FLIPPED[name]
    if (key.dim, query.dim) != (-1, -2) or name not in ("le", "lt"):
        return None
    return query.offset - key.offset - (name == "lt")


def _is_triangle(weight: torch.Tensor) -> bool:
    rows, columns = weight.shape[-2:]
    if weight.numel() > _LARGEST_TRIANGLE or weight.numel() != rows * columns:
        return False
    return torch.equal(weight, torch.ones_like(weight).tril())
