"""How recipes make decode read a selection of the cache's pages: what they all do alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import fx

from sparsify import ops
from sparsify.calibration import Calibration, as_calibration
from sparsify.contracts import GraphPass, PassContext, PassResult
from sparsify.ops import PAGE
from sparsify.passes.graph import arguments, shape_of
from sparsify.passes.selection_trust import Attended, check_trust, page_trust
from sparsify.passes.sites import as_patterns, is_disabled, left_out
from sparsify.program import ProgramSet
from sparsify.report import Decision, Verdict
from sparsify.rewriter import Rewriter
from sparsify.selectors import PageSelector

BOUNDS = "bounds"
"""Name of the state that holds the bounds of pages."""


class Handed(NamedTuple):
    """A selection that a layer leaves to those behind it."""

    layer: int
    selected: fx.Node


class Step(NamedTuple):
    """What a recipe does at one attention.

    Attributes:
        selected: what it reads, None for everything.
        handed: what the layers behind it get.
    """

    selected: fx.Node | None
    handed: Handed | None
    reason: str


@dataclass(frozen=True)
class PageSelection(GraphPass):
    """Base of recipes: attention of single tokens over the cache reads pages that are selected.

    Before::

        lengths = kv_append(keys, values, ...)
        y = paged_attention(q, keys, values, pages, lengths, counts)

    After::

        lengths = kv_append(keys, values, ...)
        selected = select_pages(q, keys, [...], pages, lengths, counts, selector, budget)
        y = paged_attention(q, keys, values, pages, lengths, counts, selected=selected)

    Contexts of at most ``budget`` tokens are read whole, as before. Prefill is left alone.

    Attributes:
        budget: tokens that are read at most, a multiple of 16.
        sinks: first tokens of a sequence, which are always read, rounded up to pages.
        recent: latest tokens that are always read, rounded up to pages.
        sites: shell patterns of the attentions it is for, ``decode.layers.3.attention``.
        skip: patterns of those that read everything, by default those of the first two layers.
        calibration: texts, as token ids, on which the report says what was left out.
        budget_error: refuse to change the output of a head by more than this share of its norm.
            A text must be longer than ``budget``.

    Raises:
        TypeError, ValueError: naming the attribute.
        ValueError: at compile time, for a model without attention over a paged cache.
        BudgetError: at compile time, naming the layer and head that break ``budget_error``.
    """

    budget: int = 512
    sinks: int = PAGE
    recent: int = PAGE
    sites: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ("*layers.[01].*",)
    calibration: Calibration | None = None
    budget_error: float | None = None

    tolerance = float("inf")
    selector: ClassVar[PageSelector]

    def __post_init__(self) -> None:
        kind = self._kind
        if self.budget % PAGE or self.budget <= 0:
            raise ValueError(
                f"{kind}: budget={self.budget} must be a multiple of {PAGE} tokens, those of a page"
            )
        if self.sinks < 0 or self.recent < 1:
            raise ValueError(
                f"{kind}: sinks={self.sinks} must be at least 0, recent={self.recent} at least 1"
            )
        for option in ("sites", "skip"):
            object.__setattr__(self, option, as_patterns(getattr(self, option)))
        if self.budget <= PAGE * sum(self._always):
            raise ValueError(
                f"{kind}: budget={self.budget} leaves nothing to choose beside sinks={self.sinks} "
                f"and recent={self.recent}, in pages of {PAGE} tokens"
            )
        check_budget(kind, self.calibration, self.budget_error)

    @property
    def _kind(self) -> str:
        """The recipe's name in errors."""
        return type(self).__name__

    @property
    def _chosen_by(self) -> str:
        """What selects, in reports."""
        return self.selector.spec

    @property
    def _always(self) -> tuple[int, int]:
        """Pages of sinks, and recent ones."""
        return -(-self.sinks // PAGE), -(-self.recent // PAGE)

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        require_cache(self._kind, programs)
        result = super().run(programs, context)
        if self.calibration is None or "prefill" not in programs.names:
            return result
        shared: dict[str, torch.Tensor] = {}

        def lists(attended: Attended) -> torch.Tensor | None:
            layer = attended.options["layer"]
            assert isinstance(layer, int)
            off = is_disabled(self._site(layer), context.disabled_sites)
            return None if off else self.lists_of(attended, shared)

        trust = page_trust(programs["prefill"], self.calibration, self._site, lists)
        check_trust(self._kind, trust, self.calibration, self.budget_error)
        told = trust.decisions(self.name, "the last tokens of the calibration select pages")
        return replace(result, decisions=(*result.decisions, *told))

    @staticmethod
    def _site(layer: int) -> str:
        return f"decode.{attention_site(layer)}"

    def lists_of(self, attended: Attended, shared: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The pages that an attention's tokens would read, None where it reads everything.

        Args:
            shared: what layers leave to those behind them, by names of their own.
        """
        layer = attended.options["layer"]
        assert isinstance(layer, int)
        kept_whole = left_out(self._site(layer), self.sites, self.skip) is not None
        if kept_whole or attended.options["window"]:
            return None
        return self.selected(attended, layer)

    def selected(self, attended: Attended, layer: int) -> torch.Tensor:
        """What the reference selects, int32 ``[kv_heads, tokens, budget]``."""
        query, keys, pages, lengths, counts = attended.cached()
        heads, (sinks, recent) = len(attended.query), self._always
        tensors = self.tensors_of(keys, pages, lengths, layer)
        return ops.select_pages.reference(
            *(query, keys, tensors, pages, lengths, counts, 0, heads, 0, self.selector.spec),
            *(self.budget // PAGE, sinks, recent),
        )[0]

    def tensors_of(
        self, keys: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, layer: int
    ) -> list[torch.Tensor]:
        """What the selector reads besides, for a cache of one layer and one sequence."""
        return []

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        before: Handed | None = None
        for node in rewriter.nodes:
            if node.target != ops.paged_attention.overload:
                continue
            layer = arguments(node)["layer"]
            site = f"{rewriter.name}.{attention_site(layer)}"
            reason = self._unfit(node, context.disabled_sites)
            if reason is None:
                with rewriter.graph.inserting_before(node):
                    tensors = self.tensors(rewriter, node)
                if shape_of(arguments(node)["query"])[1] != 1:
                    reason = "pages are selected for single tokens, these are many"
            if reason is not None:
                yield Decision(site, "attention", "skipped", reason, self.name)
                continue
            with rewriter.graph.inserting_before(node):
                step = self.select(rewriter, node, tensors, before)
            if step.selected is not None:
                set_arguments(node, selected=step.selected)
            nothing = step.selected is None and step.handed is before
            verdict: Verdict = "skipped" if nothing else "rewritten"
            yield Decision(site, "attention", verdict, step.reason, self.name)
            before = step.handed

    def _unfit(self, node: fx.Node, disabled: Iterable[str] = ()) -> str | None:
        """Why an attention stays as it is, however many tokens it is of.

        Prefill goes by the names of decode, whose state it keeps up.
        """
        options = arguments(node)
        reason = left_out(self._site(options["layer"]), self.sites, self.skip, disabled)
        if reason is not None:
            return reason
        if options["selected"] is not None:
            return "another recipe has selected its pages"
        if options["window"]:
            return f"it reads a window of {options['window']} tokens alone"
        return None

    def tensors(self, rewriter: Rewriter, node: fx.Node) -> Sequence[fx.Node]:
        """What the selector reads at an attention besides the query and the keys.

        Asked for attention of many tokens too, which may have to keep it up.
        """
        return ()

    def select(
        self,
        rewriter: Rewriter,
        node: fx.Node,
        tensors: Sequence[fx.Node],
        before: Handed | None,
    ) -> Step:
        """What is done at an attention of single tokens.

        Args:
            before: what the layers before it left to this one.
        """
        reason = f"reads at most {self.budget} tokens, in pages that {self._chosen_by} selects"
        return Step(self.call(rewriter, node, tensors), None, reason)

    def call(self, rewriter: Rewriter, node: fx.Node, tensors: Sequence[fx.Node]) -> fx.Node:
        """Adds the selection for an attention."""
        options = arguments(node)
        first, rest = ("query", "keys"), ("pages", "lengths", "counts", "layer", "heads", "offset")
        sinks, recent = self._always
        return rewriter.call(
            ops.select_pages.overload,
            (
                *(options[name] for name in first),
                list(tensors),
                *(options[name] for name in rest),
                *(self.selector.spec, self.budget // PAGE, sinks, recent),
            ),
        )


def check_budget(kind: str, calibration: Calibration | None, budget: float | None) -> None:
    as_calibration(kind, calibration)
    if budget is not None and (calibration is None or budget < 0):
        raise ValueError(
            f"{kind}: budget_error={budget} must be at least 0, and needs calibration texts"
        )


def require_cache(kind: str, programs: ProgramSet) -> None:
    """Refuses programs in which nothing attends over a paged cache.

    Raises:
        ValueError: naming the recipe.
    """
    nodes = (node for program in programs for node in program.graph.nodes)
    if not any(node.target == ops.paged_attention.overload for node in nodes):
        raise ValueError(
            f"{kind}: it selects what attention reads of a paged cache, and there is none here; "
            "compile a causal language model without example inputs, so that it generates. This "
            f"one has the entries {programs.names}"
        )


def attention_site(layer: int) -> str:
    return f"layers.{layer}.attention"


def set_arguments(node: fx.Node, **changed: object) -> None:
    """Replaces operands of a call by the names of its schema."""
    node.args, node.kwargs = tuple({**arguments(node), **changed}.values()), {}


def keep_bounds(rewriter: Rewriter, node: fx.Node, parts: int) -> fx.Node:
    """Has the bounds of an attention's pages, in so many parts, kept up before it.

    Returns the state.

    Raises:
        ValueError: the cache has bounds of other parts already.
    """
    options = arguments(node)
    layers, pages, kv_heads, head_dim, _ = shape_of(options["keys"])
    bounds = rewriter.add_state(BOUNDS, (layers, pages, kv_heads, 2, head_dim, parts))
    if (kept := shape_of(bounds)[-1]) != parts:
        raise ValueError(
            f"another recipe keeps bounds of {PAGE // int(kept)} keys in this cache, this one "
            f"needs those of {PAGE // parts}; give both the same"
        )
    names = ("keys", "pages", "lengths", "counts", "layer")
    lengths = rewriter.call(ops.page_bounds.overload, (bounds, *(options[name] for name in names)))
    set_arguments(node, lengths=lengths)
    return bounds
