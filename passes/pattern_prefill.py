"""Patterns for the prompts of a language model: prefill reads the blocks that a pattern keeps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import fx

from sparsify import ops
from sparsify.calibration import Calibration
from sparsify.ops import PAGE
from sparsify.passes.extents import Extents
from sparsify.passes.graph import arguments, aten, shape_of
from sparsify.passes.recorded_rule import ramp, record, unguarded
from sparsify.passes.select_pages import attention_site, set_arguments
from sparsify.passes.selection_trust import block_trust
from sparsify.passes.sites import left_out
from sparsify.patterns import Pattern
from sparsify.program import Program
from sparsify.report import Decision
from sparsify.rewriter import Rewriter


def site_of(program: str, layer: int) -> str:
    """The name of an attention over the cache in reports."""
    return f"{program}.{attention_site(layer)}"


def select_by_pattern(
    rewriter: Rewriter,
    pattern: Pattern,
    block: int,
    sites: Sequence[str],
    disabled: Collection[str],
    made_by: str,
) -> Iterator[Decision]:
    """Attention of many tokens over the cache reads what a pattern keeps.

    Before::

        y = paged_attention(q, keys, values, pages, lengths, counts)

    After::

        first = lengths - counts + arange(query_blocks) * block
        kept = pattern.keep(first // block, arange(key_blocks), heads) & begins before the last
        y = paged_attention(..., selected=where(listed, list_blocks(kept), -1))

    A block of queries always reads the blocks in which its own tokens lie.
    """
    made: dict[fx.Node, fx.Node] = {}
    for node in rewriter.nodes:
        if node.target != ops.paged_attention.overload:
            continue
        options = arguments(node)
        site = site_of(rewriter.name, options["layer"])
        reason = left_out(site, sites, disabled=disabled) or _misfit(options)
        if reason is not None:
            yield Decision(site, "attention", "skipped", reason, made_by)
            continue
        with rewriter.graph.inserting_before(node), unguarded(node):
            # What kv_append returns is another node in each layer; its shape and values are not.
            if not made:
                made[node] = _selected(rewriter, node, pattern, block)
            (selected,) = made.values()
        set_arguments(node, selected=selected, block=[block, block // PAGE])
        reason = f"{pattern} in blocks of {block}"
        yield Decision(site, "attention", "rewritten", reason, made_by)


def prefill_decisions(
    program: Program, calibration: Calibration, budget_error: float | None, what: str, made_by: str
) -> Iterator[Decision]:
    """What a rewritten prefill's selections cost, on texts.

    Raises:
        BudgetError: naming the layer and head.
    """
    trust = block_trust(program, calibration, lambda layer: site_of(program.name, layer))
    trust.check(made_by, budget_error)
    yield from trust.decisions(made_by, what)


def _misfit(options: dict[str, object]) -> str | None:
    query = options["query"]
    assert isinstance(query, fx.Node)
    if shape_of(query)[1] == 1:
        return "patterns are for blocks of tokens, this is one token"
    if options["selected"] is not None:
        return "another recipe has selected what it reads"
    if options["window"]:
        return f"it reads a window of {options['window']} tokens alone"
    return None


def _selected(rewriter: Rewriter, node: fx.Node, pattern: Pattern, block: int) -> fx.Node:
    o = arguments(node)
    queries, width = shape_of(o["query"])[1], shape_of(o["pages"])[1]
    heads = o["heads"] if pattern.per_head else 1
    extents = Extents(rewriter)
    rows = extents.node((queries + block - 1) // block)
    columns = extents.node((width + block // PAGE - 1) // (block // PAGE))
    per_text = [
        rewriter.call(aten.view.default, (o[n], [-1, 1, 1, 1])) for n in ("lengths", "counts")
    ]
    places = ramp(rewriter, columns)

    def rule(
        lengths: torch.Tensor,
        counts: torch.Tensor,
        row: torch.Tensor,
        key: torch.Tensor,
        head: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        first = lengths - counts + row * block
        last = first + (block - 1)
        own = (key >= first // block) & (key <= last // block)
        kept = pattern.keep(first // block, key, head) | own
        return (kept & (key * block <= last) & (key * block < lengths),)

    operands = (*per_text, ramp(rewriter, rows, 1), places, ramp(rewriter, heads, 2))

    def examples(size: int) -> tuple[torch.Tensor, ...]:
        numbers = torch.arange(size)
        text = numbers[1:, None, None, None]
        return text, text, numbers[:, None], numbers, torch.arange(heads)[:, None, None]

    (kept,) = record(rewriter, pattern, rule, operands, examples)
    ones = rewriter.call(aten._to_copy.default, (kept,), {"dtype": torch.int64})
    counts = rewriter.call(aten.sum.dim_IntList, (ones, [3], True))
    listed = rewriter.call(aten.lt.Tensor, (places, counts))
    nothing = rewriter.call(aten.scalar_tensor.default, (-1,), {"dtype": torch.int32})
    lists = rewriter.call(ops.list_blocks.overload, (kept,))
    return rewriter.call(aten.where.self, (listed, lists, nothing))
