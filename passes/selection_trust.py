"""What selections of pages and of blocks cost each head, on the texts of a calibration.

Blocks are selected in prefill, which runs as it was rewritten, in chunks, as a long prompt alone
does. Pages are selected for single tokens, so the last tokens of each text stand for those that
would be generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from sparsify import ops
from sparsify.calibration import Calibration
from sparsify.ops import PAGE, seen_blocks
from sparsify.ops.running_maximum import TILE
from sparsify.passes.attention_trust import AttentionTrust
from sparsify.passes.graph import arguments
from sparsify.program import Program

_TOKENS = 64
"""Last tokens of a text that stand for generated ones."""

Lists = Callable[["Attended"], torch.Tensor | None]
"""What one attention reads: int32 ``[lists, blocks of queries, most]``, None for everything."""


@dataclass(frozen=True)
class Attended:
    """One attention of one text, heads first.

    Attributes:
        query: ``[heads, tokens, head_dim]``; key, value: ``[kv_heads, tokens, head_dim]``.
        selected: what the program selected, None where it did not.
    """

    options: dict[str, object]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    selected: torch.Tensor | None

    def part(self, first: int, end: int) -> Attended:
        """Of the tokens from ``first`` up to ``end``, after those before them."""
        query, key, value = (x[:, :end] for x in (self.query, self.key, self.value))
        return Attended(self.options, query[:, first:], key, value, None)

    def cached(self) -> tuple[torch.Tensor, ...]:
        """``query, keys, pages, lengths, counts`` as operators take them, in a cache of one layer.

        Heads of the query begin at feature 0.
        """
        padded = torch.nn.functional.pad(self.key, (0, 0, 0, -self.key.shape[1] % PAGE))
        keys = padded.unflatten(1, (-1, PAGE)).permute(1, 0, 3, 2)[None].contiguous()
        pages = torch.arange(keys.shape[1], dtype=torch.int32)[None]
        lengths, counts = (torch.tensor([x.shape[1]]) for x in (self.key, self.query))
        return self.query.transpose(0, 1).flatten(1)[None], keys, pages, lengths, counts


def each_attention(
    program: Program,
    calibration: Calibration,
    visit: Callable[[Attended], None],
    in_chunks: bool = False,
) -> None:
    """Runs prefill on all texts and shows each attention over the cache, as it comes.

    Args:
        in_chunks: as in `Calibration.run`; a chunk's queries attend to the tokens before it too.
    """
    attentions = [n for n in program.graph.nodes if n.target == ops.paged_attention.overload]
    appends = {
        arguments(node)["layer"]: arguments(node)
        for node in program.graph.nodes
        if node.target == ops.kv_append.overload
    }
    values: dict[fx.Node, torch.Tensor] = {}
    cached: dict[fx.Node, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(node: fx.Node, result: torch.Tensor) -> None:
        values[node] = result
        if node.target != ops.paged_attention.overload:
            return
        options = arguments(node)
        append, chosen = appends[options["layer"]], options["selected"]
        _, _, kv_heads, head_dim, _ = options["keys"].meta["val"].shape
        parts = (
            (options["query"], options["offset"], options["heads"]),
            (append["key"], append["offsets"][0], int(kv_heads)),
            (append["value"], append["offsets"][1], int(kv_heads)),
        )
        query, key, value = (
            values[source][0, :, start : start + count * head_dim]
            .unflatten(-1, (count, int(head_dim)))
            .transpose(0, 1)
            for source, start, count in parts
        )
        if in_chunks:
            if node in cached:
                before = cached[node]
                key, value = torch.cat((before[0], key), 1), torch.cat((before[1], value), 1)
            cached[node] = (key, value)
        visit(Attended(options, query, key, value, None if chosen is None else values[chosen][0]))

    watched = set(attentions)
    for node in attentions:
        options = arguments(node)
        append = appends[options["layer"]]
        operands = (options["query"], append["key"], append["value"], options["selected"])
        watched |= {operand for operand in operands if operand is not None}
    for text in calibration.batches:
        cached.clear()
        Calibration([text]).run(program, watch, watched, in_chunks)


def block_trust(
    program: Program, calibration: Calibration, name: Callable[[int], str]
) -> AttentionTrust:
    """Of every attention that reads selected blocks; sites are named by their layers."""
    trust = AttentionTrust()

    def visit(attended: Attended) -> None:
        if attended.selected is not None:
            skip = attended.options["skip"]
            block = attended.options["block"]
            observe_selection(trust, attended, name, attended.selected, block, skip)

    each_attention(program, calibration, visit, in_chunks=True)
    return trust


def page_trust(
    program: Program, calibration: Calibration, name: Callable[[int], str], lists: Lists
) -> AttentionTrust:
    """Of every attention for which there are ``lists`` of pages for the last tokens of a text."""
    trust = AttentionTrust()

    def visit(attended: Attended) -> None:
        tokens = attended.query.shape[1]
        last = attended.part(max(tokens - _TOKENS, 0), tokens)
        selected = lists(last)
        if selected is not None:
            observe_selection(trust, last, name, selected, (1, 1))

    each_attention(program, calibration, visit)
    return trust


def check_trust(
    who: str, trust: AttentionTrust, calibration: Calibration, budget_error: float | None
) -> None:
    """Checks a budget on texts, on which something must have been left out to be judged.

    Raises:
        BudgetError: as `AttentionTrust.check`.
        ValueError: all texts are so short that everything is read; it names their lengths.
    """
    trust.check(who, budget_error)
    heads = tuple(trust.heads())
    if budget_error is None or not heads or any(head.density < 1 for head in heads):
        return
    raise too_short(f"{who}: budget_error={budget_error:g} cannot be checked", calibration)


def too_short(what: str, calibration: Calibration, read: str = "everything is read") -> ValueError:
    """The error of a calibration of whose texts too little is left out, or nothing."""
    lengths = sorted((len(text[0]) for text in calibration.batches), reverse=True)
    named = ", ".join(map(str, lengths[:8])) + ", ..." * (len(lengths) > 8)
    return ValueError(
        f"{what}: the calibration's texts have {named} tokens, of which {read}; give "
        "longer texts, of the lengths that will be generated with"
    )


def observe_selection(
    trust: AttentionTrust,
    attended: Attended,
    name: Callable[[int], str],
    selected: torch.Tensor,
    block: object,
    skip: object = 0.0,
    last: int | None = None,
) -> None:
    """Adds one attention that reads ``selected`` blocks of so many queries and pages.

    Args:
        last: only so many of its queries count, the last ones, up to whole tiles, which skip
            together.
    """
    assert isinstance(block, Sequence)
    options, total = attended.options, attended.key.shape[1]
    count = attended.query.shape[1]
    heads, layer, scale, cap = (options[n] for n in ("heads", "layer", "scale", "softcap"))
    assert isinstance(heads, int) and isinstance(layer, int)
    assert isinstance(scale, float) and isinstance(cap, float) and isinstance(skip, float)
    kept = seen_blocks(selected, count, total, block)
    kept = kept.repeat_interleave(heads // len(kept), 0)
    visible = torch.arange(total) <= torch.arange(total - count, total)[:, None]
    judged = slice(0 if last is None else max(count - last, 0) // TILE * TILE, None)
    trust.observe(
        name(layer),
        attended.query[:, judged],
        attended.key,
        attended.value,
        kept[None, :, judged],
        visible[judged],
        scale=scale,
        softcap=cap,
        skip=skip,
        block=block[1] * PAGE,
    )
