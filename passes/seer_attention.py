"""Prefill reads the blocks that a learned gate opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import fx

from sparsify.contracts import PassContext, PassResult
from sparsify.passes.gate_training import train_gates
from sparsify.passes.graph import arguments
from sparsify.passes.select_blocks import QUERIES, BlockSelection
from sparsify.passes.select_pages import attention_site, require_cache
from sparsify.program import ProgramSet
from sparsify.rewriter import Rewriter
from sparsify.selectors import BlockGate


@dataclass(frozen=True)
class SeerAttention(BlockSelection):
    """Blocks of keys are chosen by a product of mean queries and mean keys that was learned.

    Before::

        y = paged_attention(q, keys, values, pages, lengths, counts)

    After::

        selected = select_blocks(q, keys, [gates], pages, lengths, counts, "block_gate", density)
        y = paged_attention(q, keys, values, pages, lengths, counts, selected=selected)

    Attributes:
        gates: by layer, float32 ``[heads, head_dim, head_dim]``, as `train_gates` returns them;
            without them they are trained on ``calibration`` when the model is compiled. Gates are
            for blocks of as many keys as they were trained with.
            `BlockSelection` has the others.

    Raises:
        ValueError: naming the attribute; at compile time, for a model that has no cache, and for
            a layer that has no gates.

    Source: Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", 2024.
    """

    gates: Mapping[int, torch.Tensor] = field(default_factory=dict, repr=False)

    name = "seer_attention"
    selector = BlockGate()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gates and self.calibration is None:
            raise ValueError("SeerAttention: give gates, or calibration texts to train them on")

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        if self.gates:
            return super().run(programs, context)
        assert self.calibration is not None
        require_cache(type(self).__name__, programs)
        gates = train_gates(programs["prefill"], self.calibration, QUERIES, self.keys)
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{**options, "gates": gates}).run(programs, context)

    def tensors(self, rewriter: Rewriter, node: fx.Node) -> Sequence[fx.Node]:
        layer = arguments(node)["layer"]
        if layer not in self.gates:
            raise ValueError(f"SeerAttention: gates has none for layer {layer}")
        return (rewriter.add_weight(f"{attention_site(layer)}.gates", self.gates[layer]),)
