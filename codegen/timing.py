"""Times calls against each other: in turns, because a machine drifts from second to second."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)

_RESOLUTION = 20e-6
"""Shorter calls are timed several at a time, so that reading the clock costs under 1%."""


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
    repeats = {name: _repeats(call) for name, call in calls.items()}
    medians: dict[Name, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffler = random.Random(seed)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            _block(calls[name], repeats[name], seconds / 10)  # brings its data into the caches
            medians[name].append(_block(calls[name], repeats[name], seconds))
    return {name: statistics.median(found) for name, found in medians.items()}


def _repeats(call: Callable[[], object]) -> int:
    call()
    begin = time.perf_counter()
    call()
    return max(1, round(_RESOLUTION / max(time.perf_counter() - begin, 1e-9)))


def _block(call: Callable[[], object], repeats: int, seconds: float) -> float:
    clock, taken = time.perf_counter, []
    end = clock() + seconds
    while True:
        begin = clock()
        for _ in range(repeats):
            call()
        now = clock()
        taken.append((now - begin) / repeats)
        if now >= end:
            return statistics.median(taken)
