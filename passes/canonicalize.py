"""One spelling for each computation, and only spellings that the back end reads rightly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from sparsify.contracts import GraphPass, PassContext
from sparsify.passes.canonical_indices import (
    cat_without_empties,
    index_leading,
    part_of_cat,
    positive_index,
    positive_select,
    positive_slice,
    static_convolution_padding,
    static_squeeze,
    undone_unsqueeze,
)
from sparsify.passes.canonical_types import (
    boolean_arithmetic,
    boolean_comparison,
    boolean_reduction,
    bounded_integer_clamp,
    cast_before_reduction,
    elementwise_promotion,
    explicit_alpha,
    explicit_elu_scales,
    finite_fill,
    typed_scalar_division,
    typed_zero,
)
from sparsify.passes.graph import COPIES, arguments, aten, same_shape, shape_of
from sparsify.passes.iota import is_whole_slice
from sparsify.passes.strided import let_views_copy
from sparsify.report import Decision
from sparsify.rewriter import Rewriter

Rule = Callable[[Rewriter, fx.Node], fx.Node | None]
"""The value that replaces a node, inserted before it; None where the rule does not apply."""

_COPIES = (
    *COPIES,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
)
_SHAPED = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.repeat.default,
    aten.constant_pad_nd.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
)
_NEUTRAL = {
    aten.add.Tensor: 0,
    aten.add.Scalar: 0,
    aten.sub.Tensor: 0,
    aten.sub.Scalar: 0,
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 1,
    aten.div.Scalar: 1,
    aten.pow.Tensor_Scalar: 1,
}


def remove_identity(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """The operand of a node that only passes it on."""
    if not node.args:
        return None
    source = node.args[0][0] if node.target == aten.cat.default else node.args[0]
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    if not _is_identity(node, source) or _returns_an_input(node, source):
        return None
    let_views_copy(node, source)
    return source


def _is_identity(node: fx.Node, source: fx.Node) -> bool:
    before, after = source.meta["val"], node.meta["val"]
    if not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
        return False
    target = node.target
    if target in _COPIES or target == aten._to_copy.default:
        return bool(before.device == after.device)
    if target in (aten.dropout.default, aten.native_dropout.default):
        options = arguments(node)
        return options["p"] == 0 or not options["train"]
    if not same_shape(shape_of(source), shape_of(node)):
        return False
    if target in _SHAPED:
        # A pad of zero, a repeat of one, a view or an expansion to the same shape.
        padding = node.args[1] if target == aten.constant_pad_nd.default else ()
        return not any(padding)
    if target == aten.slice.Tensor:
        return is_whole_slice(node)
    if target == aten.permute.default:
        return [d % before.dim() for d in node.args[1]] == list(range(before.dim()))
    if target == aten.cat.default:
        return len(node.args[0]) == 1
    if target in _NEUTRAL:
        second = node.args[1]
        neutral = not isinstance(second, fx.Node) and second == _NEUTRAL[target]
        return neutral and not node.kwargs.get("rounding_mode")
    return False


def _returns_an_input(node: fx.Node, source: fx.Node) -> bool:
    """A copy of an input that is returned must stay a copy: results never alias inputs."""
    return source.op == "placeholder" and any(user.op == "output" for user in node.users)


RULES: tuple[Rule, ...] = (
    remove_identity,
    part_of_cat,
    undone_unsqueeze,
    positive_select,
    positive_slice,
    index_leading,
    positive_index,
    cat_without_empties,
    static_squeeze,
    static_convolution_padding,
    cast_before_reduction,
    boolean_reduction,
    explicit_alpha,
    explicit_elu_scales,
    typed_scalar_division,
    typed_zero,
    boolean_arithmetic,
    boolean_comparison,
    finite_fill,
    bounded_integer_clamp,
    elementwise_promotion,
)


@dataclass(frozen=True)
class Canonicalize(GraphPass):
    """Removes what does nothing and rewrites what TVM's importer reads wrongly.

    Before                                        After

    clone, contiguous, dropout, x + 0, x[:] ...   x
    select(x, d, -1)                              select(x, d, size - 1)
    slice(x, d, -2)                               slice(x, d, size - 2)
    index(x, [None, i])                           permute(index(permute(x), [i]))
    cat([empty(0), x])                            cat([x])
    slice(cat([x, y], d), d, 0, size of x)        x
    squeeze(unsqueeze(x, d), d)                   x
    int tensor * 0.5                              float(int tensor) * 0.5
    cumsum(bool)                                  cumsum(int64(bool))
    any(int tensor)                               any(int tensor != 0)
    add(x, y, alpha=2)                            x + 2 * y
    bool * bool, bool + bool, bool == True        and, or, bool
    conv(padding="same")                          conv(padding=p)
    """

    name: ClassVar[str] = "canonicalize"
    tolerance: ClassVar[float] = 1e-6

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        applied: Counter[str] = Counter()
        while any([self._step(rewriter, node, applied) for node in rewriter.nodes]):
            pass
        if applied:
            counts = ", ".join(f"{rule} {n}x" for rule, n in sorted(applied.items()))
            yield Decision("graph", "canonicalize", "rewritten", counts, self.name)

    def _step(self, rewriter: Rewriter, node: fx.Node, applied: Counter[str]) -> bool:
        """Applies the first rule that fits."""
        if node.op != "call_function" or not node.users:
            return False
        for rule in RULES:
            with rewriter.graph.inserting_before(node):
                new = rule(rewriter, node)
            if new is None:
                continue
            applied[rule.__name__] += 1
            if new.op == "call_function":
                for key, value in node.meta.items():
                    new.meta.setdefault(key, value)
            rewriter.replace(node, new)
            rewriter.graph.erase_node(node)
            return True
        return False
