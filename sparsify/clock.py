"""Times a call over and over: the block that all timing is made of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_RESOLUTION = 20e-6
"""Shorter calls are timed several at a time, so that reading the clock costs under 1%."""


def repeats_of(call: Callable[[], object], warmup: int = 1) -> int:
    """How many calls in a row take long enough to be timed, found after some to warm up."""
    for _ in range(warmup):
        call()
    begin = time.perf_counter()
    call()
    return max(1, math.ceil(_RESOLUTION / max(time.perf_counter() - begin, 1e-9)))


def block(call: Callable[[], object], repeats: int, seconds: float) -> tuple[float, ...]:
    """Seconds of a call, measured ``repeats`` calls at a time until ``seconds`` are over."""
    taken = []
    clock = time.perf_counter
    end = clock() + seconds
    while True:
        begin = clock()
        for _ in range(repeats):
            call()
        now = clock()
        taken.append((now - begin) / repeats)
        if now >= end:
            return tuple(taken)
