"""A recipe: attention reads the blocks of keys that a pattern says."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsify import ops
from sparsify.block_mask import BLOCK
from sparsify.calibration import Calibration, as_calibration
from sparsify.contracts import PassContext, PassResult
from sparsify.passes.attention_sites import AttentionSite, attention_sites, measure
from sparsify.passes.attention_trust import AttentionTrust
from sparsify.passes.canonicalize import Canonicalize
from sparsify.passes.extents import Extents
from sparsify.passes.graph import arguments, aten, shape_of
from sparsify.passes.pattern_prefill import prefill_decisions, select_by_pattern
from sparsify.passes.recorded_rule import ramp, record, unguarded
from sparsify.passes.sites import as_patterns
from sparsify.patterns import Pattern
from sparsify.program import Program, ProgramSet
from sparsify.report import Decision
from sparsify.rewriter import Rewriter


@dataclass(frozen=True)
class PatternAttention:
    """Blocks of queries read the blocks of keys that a `sparsify.patterns.Pattern` keeps.

    Before::

        y = fused_attention(q, k, v, mask, ...)

    After, the lists made once for all layers of one length and band::

        kept = pattern.keep(arange(blocks)[:, None], arange(blocks), arange(heads)[:, None, None])
        partial, full = kept & crosses the band, kept & is within the band
        y = block_attention(q, k, v, [counts, list_blocks(partial), ...], mask, ...)

    Lengths may stay dynamic: lists are made at run time, of some hundred numbers. What a mask and
    causality hide stays hidden. Prefill of a language model reads the cache by the same pattern, as
    `select_by_pattern` draws it; decode is left alone.

    Attributes:
        pattern: which blocks; counts in it are in blocks.
        block: queries and keys of a block, a multiple of 32.
        sites: shell patterns of the modules it is for.
        calibration: data on which the report's density, attention mass and error are measured.
        budget_error: the largest change of any head's output, relative to its norm, that is
            accepted; needs data.

    Raises:
        ValueError: naming the attribute; when compiling, a `BudgetError` that names the layer and
            the head, an operator of the pattern that is not elementwise, or no attention at all.
        TypeError: the calibration is none.
    """

    pattern: Pattern
    block: int = BLOCK
    sites: tuple[str, ...] = ("*",)
    calibration: Calibration | None = None
    budget_error: float | None = None

    name: ClassVar[str] = "pattern_attention"
    tolerance: ClassVar[float] = float("inf")

    def __post_init__(self) -> None:
        check_options(self.name, self.block, self.budget_error, self.calibration)
        object.__setattr__(self, "sites", as_patterns(self.sites))

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        chosen = [
            {
                site.name: self.pattern
                for site in attention_sites(program)
                if site.misfit(self.sites, self.block, context.disabled_sites) is None
            }
            for program in programs
        ]
        result = apply_patterns(self, programs, chosen, context)
        return self._prefill(result, context)

    def _prefill(self, before: PassResult, context: PassContext) -> PassResult:
        """The same for attention over the cache of a language model."""
        decisions, done = [*before.decisions], []
        shared = dict(before.programs.weights)
        for program in before.programs:
            rewriter = Rewriter(program, shared)
            options = (self.pattern, self.block, self.sites, context.disabled_sites, self.name)
            decisions += select_by_pattern(rewriter, *options)
            done.append(rewriter.finish())
        programs = Canonicalize().run(ProgramSet(tuple(done)), context).programs
        if self.calibration is not None:
            what = f"{self.pattern} in blocks of {self.block}"
            for program in programs:
                if program.name == "prefill":
                    measured = (self.calibration, self.budget_error, what, self.name)
                    decisions += prefill_decisions(program, *measured)
        if not decisions:
            raise ValueError(
                f"{self.name}: no program has attention that was recognised; run the recipe behind "
                "the portable passes, on a model that calls scaled_dot_product_attention or spells "
                "it out"
            )
        return PassResult(programs, tuple(decisions))


def check_options(name: str, block: int, budget_error: float | None, calibration: object) -> None:
    """Raises ValueError or TypeError for what no recipe of patterns can work with."""
    as_calibration(name, calibration)
    if block < 32 or block % 32:
        raise ValueError(f"{name}: block={block} must be a multiple of 32")
    if budget_error is not None and calibration is None:
        raise ValueError(
            f"{name}: budget_error={budget_error} is checked on data; give calibration too"
        )


def apply_patterns(
    recipe: Any, programs: ProgramSet, chosen: list[dict[str, Pattern]], context: PassContext
) -> PassResult:
    """Measures the patterns of the sites of each program where there is data, then applies them.

    Args:
        recipe: has ``name``, ``block``, ``sites``, ``calibration`` and ``budget_error``.
    """
    decisions: list[Decision] = []
    done, shared = [], dict(programs.weights)
    for program, patterns in zip(programs, chosen, strict=True):
        decisions += _account(recipe, program, patterns, context.disabled_sites)
        rewriter = Rewriter(program, shared)
        nodes = {node.name: node for node in rewriter.nodes}
        made: dict[Any, list[fx.Node]] = {}
        for site in attention_sites(program):
            if site.name in patterns:
                blocked = (nodes[site.node.name], patterns[site.name], recipe.block)
                _rewrite(rewriter, site, *blocked, made)
        done.append(rewriter.finish())
    tidy = Canonicalize().run(ProgramSet(tuple(done)), context)
    return PassResult(tidy.programs, tuple(decisions))


def _account(
    recipe: Any, program: Program, patterns: Mapping[str, Pattern], disabled: Collection[str]
) -> Iterator[Decision]:
    """What the recipe does to each site of a program, and to each head where that is measured."""
    trust = AttentionTrust()
    if recipe.calibration is not None and patterns:
        (trust,) = measure(program, recipe.calibration, [patterns], recipe.block)
        trust.check(recipe.name, recipe.budget_error)
    for site in attention_sites(program):
        reason = site.misfit(recipe.sites, recipe.block, disabled)
        if reason is None and site.name not in patterns:
            reason = "its heads read all blocks"
        if reason is not None:
            yield Decision(site.name, "attention", "skipped", reason, recipe.name)
            continue
        what = f"{patterns[site.name]} in blocks of {recipe.block}"
        if site.name in trust.sites:
            yield from trust.decisions(recipe.name, what, (site.name,))
            continue
        marks = patterns[site.name].marks(-(-site.length // recipe.block), site.heads)
        reason = (
            f"{what}; {marks.float().mean():.1%} of the blocks of {site.length} positions, before "
            "any mask; what that costs is not known without calibration data"
        )
        yield Decision(site.name, "attention", "rewritten", reason, recipe.name)


def _rewrite(
    rewriter: Rewriter,
    site: AttentionSite,
    node: fx.Node,
    pattern: Pattern,
    block: int,
    made: dict[Any, list[fx.Node]],
) -> None:
    o = arguments(node)
    length, heads = shape_of(o["query"])[1], site.heads if pattern.per_head else 1
    masked = o["mask"] is not None
    key = (pattern, site.band, masked, heads, str(length))
    with rewriter.graph.inserting_before(node), unguarded(node):
        if key not in made:
            rows = Extents(rewriter).node((length + block - 1) // block)

            def rule(
                query: torch.Tensor, key: torch.Tensor, head: torch.Tensor
            ) -> tuple[torch.Tensor, torch.Tensor]:
                kept = pattern.keep(query, key, head) | (query == key)
                first, second = query * block, key * block
                some, every = site.band.of_ranges(
                    first, first + (block - 1), second, second + (block - 1)
                )
                every = every & (query < 0) if masked else every
                return kept & some & ~every, kept & every

            places = ramp(rewriter, rows)
            operands = ramp(rewriter, rows, 1), places, ramp(rewriter, heads, 2)

            def examples(size: int) -> tuple[torch.Tensor, ...]:
                numbers = torch.arange(size)
                return numbers[:, None], numbers, torch.arange(heads)[:, None, None]

            maps = record(rewriter, pattern, rule, operands, examples)
            made[key] = _lists(rewriter, maps)
        names = ("heads", "kv_heads", "head_dim", "offsets", "scale")
        tail = (o[name] for name in ("causal", "window", "sinks", "softcap"))
        blocked = rewriter.call(
            ops.block_attention.overload,
            (
                *(o[name] for name in ("query", "key", "value")),
                made[key],
                o["mask"],
                *(o[name] for name in names),
                [block, block],
                *tail,
            ),
        )
    rewriter.replace(node, blocked)


def _lists(rewriter: Rewriter, maps: Iterable[fx.Node]) -> list[fx.Node]:
    """Counts and indices of two maps, each of ``[1, heads, blocks, blocks]``."""
    lists = []
    for marks in maps:
        while len(shape_of(marks)) < 4:
            marks = rewriter.call(aten.unsqueeze.default, (marks, 0))
        ones = rewriter.call(aten._to_copy.default, (marks,), {"dtype": torch.int64})
        wide = rewriter.call(aten.sum.dim_IntList, (ones, [3], False))
        lists.append(rewriter.call(aten._to_copy.default, (wide,), {"dtype": torch.int32}))
        lists.append(rewriter.call(ops.list_blocks.overload, (marks,)))
    return lists
