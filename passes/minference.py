"""Prefill reads blocks by patterns that were found offline, one for each head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import fx

from sparsify import ops
from sparsify.contracts import PassContext, PassResult
from sparsify.passes.attention_trust import AttentionTrust
from sparsify.passes.graph import arguments
from sparsify.passes.select_blocks import QUERIES, BlockSelection
from sparsify.passes.select_pages import attention_site, require_cache
from sparsify.passes.selection_trust import (
    Attended,
    each_attention,
    observe_selection,
    too_short,
)
from sparsify.program import Program, ProgramSet
from sparsify.report import Decision
from sparsify.rewriter import Rewriter
from sparsify.selectors import PATTERNS, HeadPatterns


@dataclass(frozen=True)
class MInference(BlockSelection):
    """Each head reads blocks by the pattern that changed its output least on texts.

    Before::

        y = paged_attention(q, keys, values, pages, lengths, counts)

    After, where ``patterns`` has a number for each head::

        selected = select_blocks(
            q, keys, [patterns], pages, lengths, counts, "head_patterns", density)
        y = paged_attention(q, keys, values, pages, lengths, counts, selected=selected)

    The patterns are ``a_shape`` (the first and the nearest blocks), ``vertical_slash`` (where and
    at whose distance the latest queries look) and ``block_sparse`` (by mean queries and mean keys).
    All are measured at the same density on the attention of the model as it is, so that what other
    layers leave out has no say; of equal ones the cheapest is taken, in this order. What counts is
    the output of each text's last tokens, so texts should end with what needs their beginning, as a
    question does: on all tokens the patterns for what is near win, which do not retrieve. The
    figures of the report and ``budget_error`` are of all tokens, as in every recipe.

    Attributes:
        patterns: by layer, the name of each query head's pattern; without them they are searched on
            ``calibration`` when the model is compiled. `BlockSelection` has the others.
        last_tokens: tokens at the end of each text whose outputs are compared.

    Raises:
        TypeError, ValueError: naming the attribute; at compile time, for a model that has no cache,
            for texts so short that everything is read, and for a layer without a pattern for each
            of its heads.

    Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via
    Dynamic Sparse Attention", 2024, "kernel-aware optimal sparse pattern search". There, patterns
    are compared at the same number of operations, here at the same number of blocks.
    """

    patterns: Mapping[int, Sequence[str]] = field(default_factory=dict)
    last_tokens: int = 64

    name = "minference"
    selector = HeadPatterns()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.patterns and self.calibration is None:
            raise ValueError(
                "MInference: give calibration texts, on which the pattern of each head is "
                "searched, or patterns that were"
            )
        if self.last_tokens < 1:
            raise ValueError(f"MInference: last_tokens={self.last_tokens} must be at least 1")
        for layer, names in self.patterns.items():
            for name in names:
                if name not in PATTERNS:
                    raise ValueError(
                        f"MInference: patterns has {name!r} for a head of layer {layer}; there "
                        f"are {', '.join(PATTERNS)}"
                    )

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        require_cache(type(self).__name__, programs)
        recipe, errors = self, {}
        if not self.patterns:
            found = self._search(programs["prefill"], context)
            names = {layer: [name for name, _ in heads] for layer, heads in found.items()}
            recipe = replace(self, patterns=names)
            errors = {
                layer: sum(error for _, error in heads) / len(heads)
                for layer, heads in found.items()
            }
        result = BlockSelection.run(recipe, programs, context)
        rewritten = {d.site for d in result.decisions if d.verdict == "rewritten"}
        told = (d for d in recipe._told(errors) if d.site in rewritten)
        return replace(result, decisions=(*told, *result.decisions))

    def _told(self, errors: Mapping[int, float]) -> Iterator[Decision]:
        """Which heads of each layer have which pattern, and their mean error if searched."""
        for layer, names in self.patterns.items():
            heads = {
                name: [head for head, own in enumerate(names) if own == name] for name in PATTERNS
            }
            most_first = sorted(heads.items(), key=lambda item: -len(item[1]))
            reason = ", ".join(
                f"{len(own)} head{'s' * (len(own) > 1)} {name} ({', '.join(map(str, own))})"
                for name, own in most_first
                if own
            )
            if layer in errors:
                reason += f": mean error {errors[layer]:.1%} of the last {self.last_tokens} tokens"
            yield Decision(self._site(layer), "attention patterns", "rewritten", reason, self.name)

    def tensors(self, rewriter: Rewriter, node: fx.Node) -> Sequence[fx.Node]:
        options = arguments(node)
        layer, heads = options["layer"], options["heads"]
        names = self.patterns.get(layer, ())
        if len(names) != heads:
            raise ValueError(
                f"MInference: patterns has {len(names)} names for layer {layer}, which has "
                f"{heads} query heads"
            )
        numbers = list(PATTERNS)
        patterns = torch.tensor([numbers.index(name) for name in names], dtype=torch.int32)
        return (rewriter.add_weight(f"{attention_site(layer)}.patterns", patterns),)

    def _search(self, prefill: Program, context: PassContext) -> dict[int, list[tuple[str, float]]]:
        """By layer, each query head's pattern and the change of its output by it."""
        assert self.calibration is not None
        trusts = {name: AttentionTrust() for name in PATTERNS}
        layers: dict[int, None] = {}

        def visit(attended: Attended) -> None:
            layer, tokens = attended.options["layer"], attended.query.shape[1]
            assert isinstance(layer, int)
            if self._unfit(self._site(layer), attended.options, context) is not None:
                return
            layers[layer] = None
            # As a prompt comes: in each chunk its own latest queries choose.
            for first, end in pairwise(ops.chunk_bounds(tokens)):
                last = self.last_tokens - (tokens - end)
                if last <= 0:
                    continue
                part = attended.part(first, end)
                for name, trust in trusts.items():
                    selected = self._selected(part, name)
                    block, skip = (QUERIES, self.keys // ops.PAGE), float(self.skip_below)
                    observe_selection(trust, part, self._site, selected, block, skip, last)

        each_attention(prefill, self.calibration, visit)
        costs = {name: tuple(trust.heads()) for name, trust in trusts.items()}
        same = all(len({h.error for h in own}) == 1 for own in zip(*costs.values(), strict=True))
        if layers and self.density < 1 and same:
            raise too_short(
                "MInference: no pattern can be told from another",
                self.calibration,
                "each pattern reads the same blocks",
            )
        found: dict[int, list[tuple[str, float]]] = {}
        for layer in layers:
            site = self._site(layer)
            errors = [
                [(name, head.error) for head in own if head.site == site]
                for name, own in costs.items()
            ]
            # Of equal ones min takes the first.
            found[layer] = [
                min(of_head, key=lambda c: c[1]) for of_head in zip(*errors, strict=True)
            ]
        return found

    def _selected(self, attended: Attended, pattern: str) -> torch.Tensor:
        """What all heads of an attention would read by a pattern."""
        query, keys, pages, lengths, counts = attended.cached()
        heads, scale = attended.options["heads"], attended.options["scale"]
        assert isinstance(heads, int) and isinstance(scale, float)
        selected: torch.Tensor = ops.select_blocks.reference(
            *(query, keys, [], pages, lengths, counts, 0, heads, 0, scale),
            *(PATTERNS[pattern].spec, *self._choice),
        )
        return selected[0]
