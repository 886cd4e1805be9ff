"""CHESS: gates of gated networks that change little are zero, by a threshold for each channel.

Source: He et al., "CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective
Sparsification", EMNLP 2024: its channel-wise thresholding. What it does beside that, thresholds on
the inputs of some attention projections, is `Teal` with ``sites``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.gates import ChannelThreshold, Gate
from sparsify.passes.gating.observed import Observed
from sparsify.passes.gating.recipe import At, Gating


@dataclass(frozen=True)
class Chess(Gating):
    """Zeroes activated gates whose magnitude, times that of the up projection on average, is small.

    Like `Cats`, with a threshold for each channel::

        h = channel_threshold(silu(x @ Wg.T));  y = (h * (x @ Wu.T)) @ Wd.T

    The attributes are those of `Gating`.
    """

    name = "chess"

    def rule(self) -> type[Gate]:
        return ChannelThreshold

    def gated(self) -> At:
        return "gates"

    def importance(self, observed: Observed) -> torch.Tensor:
        return observed.mean_factor()
