"""Decode selects pages in a few layers, and the layers behind each read the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from sparsify.passes.graph import arguments
from sparsify.passes.select_pages import PageSelection
from sparsify.passes.selection_trust import Attended
from sparsify.rewriter import Rewriter
from sparsify.selectors import Exact


@dataclass(frozen=True)
class TidalDecode(PageSelection):
    """Layers read the pages that the last selecting layer before them found by its exact scores.

    Before::

        y2 = paged_attention(q2, ...)    y3 = paged_attention(q3, ...)    y4 = ...

    After::

        selected = select_pages(q2, keys, [], pages, lengths, counts, "exact", budget)
        y2 = paged_attention(q2, ...)
        y3 = paged_attention(q3, ..., selected=selected)    y4 = ... selected=selected

    A selecting layer itself reads everything, and so do the layers before the first one.

    Attributes:
        selecting: numbers of the selecting layers; the paper has the third and one in the middle.

    Source: Yang et al., "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent
    Sparse Attention", 2024.
    """

    selecting: tuple[int, ...] = (2, 13)

    name = "tidal_decode"
    selector = Exact()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "selecting", tuple(self.selecting))
        if not self.selecting or min(self.selecting) < 0:
            raise ValueError(f"TidalDecode: selecting={self.selecting} must name layers, from 0 on")

    def select(
        self,
        rewriter: Rewriter,
        node: fx.Node,
        tensors: Sequence[fx.Node],
        before: fx.Node | None,
    ) -> tuple[fx.Node | None, fx.Node | None]:
        if arguments(node)["layer"] in self.selecting:
            return None, self.call(rewriter, node, tensors)
        return before, before

    def lists_of(self, attended: Attended, shared: dict[str, torch.Tensor]) -> torch.Tensor | None:
        found = super().lists_of(attended, shared)
        if attended.options["layer"] in self.selecting and found is not None:
            shared["selected"] = found
            return None
        return None if found is None else shared.get("selected")

    def done(self, layer: int) -> str:
        if layer in self.selecting:
            return f"reads everything, and selects {self.budget} tokens for the layers behind it"
        source = max((s for s in self.selecting if s < layer), default=None)
        if source is None:
            return "reads everything, before the first layer that selects"
        return f"reads at most {self.budget} tokens, in pages that layer {source} selected"
