"""How recipes make prefill read selected blocks of the cache: what they all do alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from sparsify import ops
from sparsify.calibration import Calibration
from sparsify.contracts import GraphPass, PassContext, PassResult
from sparsify.ops import PAGE
from sparsify.passes.graph import arguments, shape_of
from sparsify.passes.select_pages import (
    attention_site,
    check_budget,
    require_cache,
    set_arguments,
)
from sparsify.passes.selection_trust import block_trust, check_trust
from sparsify.passes.sites import as_patterns, left_out
from sparsify.program import ProgramSet
from sparsify.report import Decision
from sparsify.rewriter import Rewriter
from sparsify.selectors import BlockSelector

QUERIES = 64
"""Of a block of queries: whole tiles of every kernel."""


@dataclass(frozen=True)
class BlockSelection(GraphPass):
    """Base of recipes: attention of many tokens over the cache reads blocks that are selected.

    Before::

        y = paged_attention(q, keys, values, pages, lengths, counts)

    After::

        selected = select_blocks(q, keys, [...], pages, lengths, counts, selector, density)
        y = paged_attention(q, keys, values, pages, lengths, counts, selected=selected, skip=...)

    Every query head and block of 64 queries has blocks of its own. Decode is left alone: combine it
    with a recipe that selects pages.

    Attributes:
        density: share of the visible blocks that is read, at most; those with the first and the
            latest tokens are always read.
        keys: of a block, a multiple of 16. Smaller ones miss less of what a single query looks for,
            and take as long.
        sinks, recent: tokens that are always read, from the first and before the latest, rounded up
            to blocks.
        skip_below: a selected block is skipped, before its values are read, by a tile of queries
            that all score its keys lower by more than this than the best so far, as SpargeAttention
            does; 0: none is. ``n`` keys so skipped change an output by at most
            ``2 n exp(-skip_below)`` of the largest value. With a density of 1 this is all that is
            left out.
        sites: shell patterns of the attentions it is for, ``prefill.layers.3.attention``.
        skip: patterns of those that read everything.
        calibration: texts, as token ids, on which the report says what was left out.
        budget_error: refuse to change the output of a head by more than this share of its norm.
            With a density below 1, a text must be long enough that blocks of it are left out.

    Raises:
        TypeError, ValueError: naming the attribute.
        ValueError: at compile time, for a model without attention over a paged cache.
        BudgetError: at compile time, naming the layer and head that break ``budget_error``.
    """

    density: float = 0.25
    keys: int = 16
    sinks: int = 16
    recent: int = 16
    skip_below: float = 0.0
    sites: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    calibration: Calibration | None = None
    budget_error: float | None = None

    tolerance = float("inf")
    selector: ClassVar[BlockSelector]
    mass: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if not 0 < self.density <= 1:
            raise ValueError(f"{kind}: density={self.density} must be above 0 and at most 1")
        if self.keys % PAGE or self.keys <= 0:
            raise ValueError(
                f"{kind}: keys={self.keys} must be a multiple of {PAGE}, those of a page"
            )
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(
                f"{kind}: sinks={self.sinks} and recent={self.recent} must be at least 0"
            )
        if self.skip_below < 0:
            raise ValueError(f"{kind}: skip_below={self.skip_below} must be at least 0")
        for option in ("sites", "skip"):
            object.__setattr__(self, option, as_patterns(getattr(self, option)))
        check_budget(kind, self.calibration, self.budget_error)

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        require_cache(type(self).__name__, programs)
        result = super().run(programs, context)
        if self.calibration is None or "prefill" not in programs.names:
            return result
        trust = block_trust(result.programs["prefill"], self.calibration, self._site)
        if self.density < 1:
            check_trust(type(self).__name__, trust, self.calibration, self.budget_error)
        else:
            trust.check(type(self).__name__, self.budget_error)
        told = trust.decisions(self.name, "blocks are selected in the texts of the calibration")
        return replace(result, decisions=(*result.decisions, *told))

    @staticmethod
    def _site(layer: int) -> str:
        return f"prefill.{attention_site(layer)}"

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        for node in rewriter.nodes:
            if node.target != ops.paged_attention.overload:
                continue
            site = f"{rewriter.name}.{attention_site(arguments(node)['layer'])}"
            reason = self._unfit(site, arguments(node), context)
            if reason is not None:
                yield Decision(site, "attention", "skipped", reason, self.name)
                continue
            with rewriter.graph.inserting_before(node):
                selected = self._select(rewriter, node)
            block = [QUERIES, self.keys // PAGE]
            set_arguments(node, selected=selected, block=block, skip=float(self.skip_below))
            yield Decision(
                site,
                "attention",
                "rewritten",
                f"reads at most {self.density:.0%} of the blocks of {self.keys} keys that it may "
                f"see, those that {self.selector.spec} selects, and the first and the latest",
                self.name,
            )

    def _unfit(self, site: str, options: Mapping[str, Any], context: PassContext) -> str | None:
        """Why an attention stays as it is."""
        reason = left_out(site, self.sites, self.skip, context.disabled_sites)
        if reason is not None:
            return reason
        if shape_of(options["query"])[1] == 1:
            return "blocks are selected for many tokens, this is one"
        if options["selected"] is not None:
            return "another recipe has selected what it reads"
        if options["window"]:
            return f"it reads a window of {options['window']} tokens alone"
        return None

    def tensors(self, rewriter: Rewriter, node: fx.Node) -> Sequence[fx.Node]:
        """What the selector reads at an attention besides the query and the keys."""
        return ()

    def _select(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        options = arguments(node)
        rest = ("pages", "lengths", "counts", "layer", "heads", "offset", "scale")
        tensors = list(self.tensors(rewriter, node))
        return rewriter.call(
            ops.select_blocks.overload,
            (
                *(options["query"], options["keys"], tensors, *(options[name] for name in rest)),
                *(self.selector.spec, *self._choice),
            ),
        )

    @property
    def _choice(self) -> tuple[list[int], float, float, int, int]:
        """What follows the selector in `ops.select_blocks`."""
        sinks, recent = -(-self.sinks // self.keys), 1 + -(-self.recent // self.keys)
        return [QUERIES, self.keys // PAGE], self.density, self.mass, sinks, recent
