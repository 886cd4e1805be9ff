"""Activations of a program on calibration data: some tokens of each value that is asked for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from sparsify.calibration import Calibration
from sparsify.program import Program

TOKENS = 512
"""Tokens that are kept of each value, about, spread evenly over the batches."""


def samples(
    program: Program, calibration: Calibration, nodes: Iterable[fx.Node], tokens: int = TOKENS
) -> dict[fx.Node, torch.Tensor]:
    """``[tokens, features]`` of each node on the calibration's batches, in order.

    Args:
        program: in which the nodes are.
        tokens: at most so many, rounded up to a multiple of the number of batches.
    """
    share = -(-tokens // len(calibration.batches))
    seen: dict[fx.Node, list[torch.Tensor]] = {node: [] for node in nodes}

    def watch(node: fx.Node, value: torch.Tensor) -> None:
        rows = value.detach().reshape(-1, value.shape[-1])
        step = max(1, -(-len(rows) // share))
        seen[node].append(rows[step // 2 :: step].float().clone())

    calibration.run(program, watch, seen)
    return {node: torch.cat(parts) for node, parts in seen.items()}
