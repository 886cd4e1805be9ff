"""Decode reads the pages that a few features of the keys point to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from sparsify import ops
from sparsify.calibration import Calibration
from sparsify.contracts import PassContext, PassResult
from sparsify.passes.graph import arguments
from sparsify.passes.select_pages import PageSelection, attention_site, require_cache
from sparsify.program import Program, ProgramSet
from sparsify.rewriter import Rewriter
from sparsify.selectors import Channels


@dataclass(frozen=True)
class DoubleSparsity(PageSelection):
    """A step reads the pages whose keys have the largest products with its query in few features.

    Before::

        y = paged_attention(q, keys, values, pages, lengths, counts)

    After::

        selected = select_pages(q, keys, [channels], pages, lengths, counts, "channels", budget)
        y = paged_attention(q, keys, values, pages, lengths, counts, selected=selected)

    The features are those in which products with queries differ most from key to key on calibration
    data, over all query heads of a key head. The paper takes the largest products instead, but what
    all keys have in common, however large, says nothing about which of them to read. Of 72 numbers
    hidden in editorials of 1,000 to 4,000 tokens (seeds 101 to 108 of `benchmarks/needles.py`, on
    which neither rule was tuned), SmolLM2-135M that reads 512 tokens a step finds 62 with 16
    features chosen so on 512 tokens of film reviews, and 52 with those of the paper;
    calibrated on editorials, 57 and 54. With 8 features neither rule serves: 16 and 17 of the
    first 36.

    Attributes:
        channels: features of a key head that are read. `PageSelection` has the others, of which
            ``calibration`` is needed.

    Raises:
        ValueError: naming the attribute; at compile time, for a model that has no cache.

    Source: Yang et al., "Post-Training Sparse Attention with Double Sparsity", 2024.
    """

    channels: int = 16

    name = "double_sparsity"
    selector = Channels()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels < 1 or self.calibration is None:
            raise ValueError(
                f"DoubleSparsity: channels={self.channels} must be at least 1, and calibration "
                "texts must be given, on which they are chosen"
            )

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        assert self.calibration is not None
        require_cache(self._kind, programs)
        chosen = important_channels(programs["prefill"], self.calibration, self.channels)
        sizes = (self.budget, self.sinks, self.recent, self.sites, self.skip)
        trust = (self.calibration, self.budget_error)
        return _Calibrated(*sizes, *trust, chosen=chosen).run(programs, context)


@dataclass(frozen=True)
class _Calibrated(PageSelection):
    """`DoubleSparsity` with the channels of each layer, int32 ``[kv_heads, channels]``."""

    chosen: Mapping[int, torch.Tensor] = field(kw_only=True)

    name = DoubleSparsity.name
    selector = Channels()

    @property
    def _kind(self) -> str:
        return DoubleSparsity.__name__

    def tensors(self, rewriter: Rewriter, node: fx.Node) -> Sequence[fx.Node]:
        layer = arguments(node)["layer"]
        return (rewriter.add_weight(f"{attention_site(layer)}.channels", self.chosen[layer]),)

    def tensors_of(
        self, keys: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, layer: int
    ) -> list[torch.Tensor]:
        return [self.chosen[layer]]


def important_channels(
    program: Program, calibration: Calibration, count: int
) -> dict[int, torch.Tensor]:
    """The features of each key head whose products differ most among keys, by layer, ascending.

    That is a feature's mean absolute query times the standard deviation of its keys.
    """
    readers: dict[fx.Node, list[tuple[int, str, int, int]]] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for node in program.graph.nodes:
        if node.target == ops.kv_append.overload:
            options = arguments(node)
            _, _, kv_heads, head_dim, _ = options["keys"].meta["val"].shape
            sizes[options["layer"]] = (int(kv_heads), int(head_dim))
            part = (options["layer"], "key", options["offsets"][0], int(kv_heads))
            readers.setdefault(options["key"], []).append(part)
        elif node.target == ops.paged_attention.overload:
            options = arguments(node)
            part = (options["layer"], "query", options["offset"], options["heads"])
            readers.setdefault(options["query"], []).append(part)
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}

    def watch(node: fx.Node, value: torch.Tensor) -> None:
        for layer, kind, start, heads in readers[node]:
            kv_heads, head_dim = sizes[layer]
            mine = value[..., start : start + heads * head_dim].double().flatten(0, -2)
            mine = mine.view(len(mine), kv_heads, -1, head_dim)
            found = mine.abs().mean((0, 2)) if kind == "query" else mine[:, :, 0].var(0, False)
            seen.setdefault((layer, kind), []).append(found)

    calibration.run(program, watch, readers)
    found = {}
    for layer, (_, head_dim) in sizes.items():
        queries, spread = (torch.stack(seen[layer, kind]).mean(0) for kind in ("query", "key"))
        best = (queries * spread.sqrt()).topk(min(count, head_dim)).indices
        found[layer] = best.sort().values.int()
    return found
