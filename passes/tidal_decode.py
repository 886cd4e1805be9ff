"""Decode selects pages in a few layers, and the layers behind each read the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from sparsify import ops
from sparsify.contracts import PassContext, PassResult
from sparsify.passes.graph import arguments, shape_of
from sparsify.passes.select_pages import Handed, PageSelection, Step
from sparsify.passes.selection_trust import Attended
from sparsify.program import Program, ProgramSet
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
        selecting: numbers of the selecting layers; the paper has the third and one in the middle,
            which it chooses for each model by how well it retrieves. So should you: of 27 numbers
            that SmolLM2-135M finds in texts it keeps 7 with (2, 13) and 25 with (8, 18).
            `PageSelection` has the others.

    Raises:
        ValueError: naming the attribute; at compile time, naming a layer that cannot select: it
            is none of the model's, is left alone itself, or no layer behind it reads a selection.

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

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        for program in programs:
            self._check_layers(program)
        return super().run(programs, context)

    def _check_layers(self, program: Program) -> None:
        """Refuses numbers of layers that cannot select, or for which none behind them reads."""
        unfit = {
            arguments(node)["layer"]: self._unfit(node)
            for node in program.graph.nodes
            if node.target == ops.paged_attention.overload
            and shape_of(arguments(node)["query"])[1] == 1
        }
        sources = {
            max((s for s in self.selecting if s < layer), default=None)
            for layer, reason in unfit.items()
            if reason is None and layer not in self.selecting
        }
        for layer in self.selecting if unfit else ():
            reason = unfit.get(layer, f"the model's layers are {min(unfit)} to {max(unfit)}")
            if reason is None and layer not in sources:
                reason = "no layer behind it would read what it selects"
            if reason is not None:
                raise ValueError(
                    f"TidalDecode: selecting={self.selecting}: layer {layer} cannot select, "
                    f"{reason}; name other layers"
                )

    def select(
        self,
        rewriter: Rewriter,
        node: fx.Node,
        tensors: Sequence[fx.Node],
        before: Handed | None,
    ) -> Step:
        layer = arguments(node)["layer"]
        if layer in self.selecting:
            handed = Handed(layer, self.call(rewriter, node, tensors))
            reason = f"reads everything, and selects {self.budget} tokens for layers behind it"
            return Step(None, handed, reason)
        if before is None:
            return Step(None, None, "reads everything, as no layer before it selects")
        reason = f"reads at most {self.budget} tokens, in pages that layer {before.layer} selected"
        return Step(before.selected, before, reason)

    def lists_of(self, attended: Attended, shared: dict[str, torch.Tensor]) -> torch.Tensor | None:
        found = super().lists_of(attended, shared)
        if attended.options["layer"] in self.selecting and found is not None:
            shared["selected"] = found
            return None
        return None if found is None else shared.get("selected")
