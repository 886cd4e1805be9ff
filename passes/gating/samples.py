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
    program: Program,
    calibration: Calibration,
    nodes: Iterable[fx.Node],
    tokens: int = TOKENS,
    run: int = 1,
) -> dict[fx.Node, torch.Tensor]:
    """``[tokens, features]`` of each node on the calibration's batches, in order.

    Args:
        program: in which the nodes are.
        tokens: about so many, at least one run of each batch.
        run: tokens that follow each other in a batch are taken in runs of so many, where it has
            them.
    """
    runs = max(1, round(tokens / (run * len(calibration.batches))))
    seen: dict[fx.Node, list[torch.Tensor]] = {node: [] for node in nodes}

    def watch(node: fx.Node, value: torch.Tensor) -> None:
        rows = value.detach().reshape(-1, value.shape[-1])
        seen[node].append(rows[_places(len(rows), runs, run)].float())

    calibration.run(program, watch, seen)
    return {node: torch.cat(parts) for node, parts in seen.items()}


def _places(count: int, runs: int, length: int) -> torch.Tensor:
    """Runs of that length spread evenly over ``count`` rows; all rows where they are few."""
    if count <= runs * length:
        return torch.arange(count)
    starts = torch.linspace(0, count - length, runs).round().long()
    return (starts[:, None] + torch.arange(length)).flatten().unique()
