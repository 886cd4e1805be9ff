"""Blocks by the pattern of their head, one of three.

Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic
Sparse Attention", 2024, where the pattern of a head is found offline; see
`sparsify.passes.minference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.selectors.a_shape import AShape
from sparsify.selectors.base import BlockSelector, BlockView, register_block_selector
from sparsify.selectors.pooled import Pooled
from sparsify.selectors.vertical_slash import VerticalSlash

PATTERNS: dict[str, BlockSelector] = {
    "a_shape": AShape(),
    "vertical_slash": VerticalSlash(),
    "block_sparse": Pooled(),
}
"""By the paper's name. The place of one is its number in ``patterns``."""


@register_block_selector
@dataclass(frozen=True)
class HeadPatterns(BlockSelector):
    """The weights of the pattern that ``patterns``, int32 ``[heads]``, names for the head."""

    name = "head_patterns"
    scoring = "head_patterns"
    tensors = ("patterns",)

    def weights(self, view: BlockView, **tensors: torch.Tensor) -> torch.Tensor:
        number = int(tensors["patterns"])
        if not 0 <= number < len(PATTERNS):
            known = ", ".join(f"{at} {name}" for at, name in enumerate(PATTERNS))
            raise ValueError(
                f"selector head_patterns: a head has the pattern {number}; there are {known}"
            )
        return list(PATTERNS.values())[number].weights(view)
