"""Times calls against each other: in turns, because a machine drifts from second to second."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from sparsify.clock import block, repeats_of

Name = TypeVar("Name", bound=Hashable)


def in_turns(
    calls: Mapping[Name, Callable[[], object]], rounds: int, seconds: float, seed: int = 0
) -> dict[Name, float]:
    """Seconds of each call: the median over the rounds of the block's median.

    Args:
        calls: what to time, by name.
        rounds: how often each gets a block.
        seconds: length of one block.
        seed: of the order inside the rounds.
    """
    repeats = {name: repeats_of(call) for name, call in calls.items()}
    medians: dict[Name, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffler = random.Random(seed)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            block(calls[name], repeats[name], seconds / 10)  # brings its data into the caches
            found = block(calls[name], repeats[name], seconds)
            medians[name].append(statistics.median(found))
    return {name: statistics.median(of) for name, of in medians.items()}
