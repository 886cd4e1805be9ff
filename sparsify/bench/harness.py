"""Interleaved timing, and ratios with their spread.

A shared machine drifts: its clock, its caches and its neighbours change from second to second. So
times are never compared across runs. All candidates take turns in short blocks, in an order that
is shuffled each round, and a ratio is formed inside each round, where both sides saw the same
machine. The median over rounds and its bootstrap interval are what is reported.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparsify.clock import block, repeats_of

_SLICE = 0.01
"""Seconds over which idleness is judged; the kernel's accounting steps by 4 ms."""


@dataclass(frozen=True)
class Samples:
    """Seconds a call of one candidate, grouped by round."""

    name: str
    rounds: tuple[tuple[float, ...], ...]

    @property
    def medians(self) -> np.ndarray:
        """The median of each round, seconds."""
        return np.array([np.median(r) for r in self.rounds])

    @property
    def median(self) -> float:
        """Median over rounds of the round's median, seconds."""
        return float(np.median(self.medians))

    def percentile(self, percent: float) -> float:
        """Percentile over all calls of all rounds, seconds."""
        return float(np.percentile(np.concatenate(self.rounds), percent))

    def to_dict(self) -> dict[str, Any]:
        return {
            "p50_ms": self.percentile(50) * 1e3,
            "p90_ms": self.percentile(90) * 1e3,
            "p99_ms": self.percentile(99) * 1e3,
            "rounds": len(self.rounds),
            "calls": sum(map(len, self.rounds)),
        }


@dataclass(frozen=True)
class Ratio:
    """A ratio of times with its 95% bootstrap interval; below 1 the numerator is faster."""

    median: float
    low: float
    high: float

    @property
    def inverse(self) -> Ratio:
        """The same comparison as a speed-up of the numerator over the denominator."""
        return Ratio(1 / self.median, 1 / self.high, 1 / self.low)

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int = 15,
    seconds: float = 0.1,
    *,
    warmup: int = 3,
    settle: float = 0.2,
    seed: int = 0,
) -> dict[str, Samples]:
    """Times all candidates in turns.

    Args:
        candidates: name -> a call without arguments; what it returns is dropped.
        rounds: how often each candidate gets a block; at least 2, from 10 the interval means much.
        seconds: length of one block of one candidate.
        warmup: calls of each candidate before the first round.
        settle: longest pause before a block, seconds. The pause ends when the worker threads of
            the candidate before stopped spinning (ONNX Runtime's take 40 ms), else they would
            take the next one's core. The calls of the first tenth of ``seconds`` after it are
            dropped.
        seed: of the order inside the rounds.

    Raises:
        ValueError: without a candidate, or with fewer than two rounds.
    """
    if not candidates:
        raise ValueError("interleave: no candidates to time; pass at least one callable")
    if rounds < 2 or seconds <= 0:
        raise ValueError(f"interleave: rounds={rounds} must be >= 2 and seconds={seconds} > 0")
    repeats = {name: repeats_of(call, warmup) for name, call in candidates.items()}
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in candidates}
    order = list(candidates)
    shuffler = random.Random(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffler.shuffle(order)
            for name in order:
                _settle(settle)
                block(candidates[name], repeats[name], seconds / 10)
                taken[name].append(block(candidates[name], repeats[name], seconds))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(name, tuple(blocks)) for name, blocks in taken.items()}


def ratio(
    numerator: Samples, denominator: Samples, *, resamples: int = 2000, seed: int = 0
) -> Ratio:
    """Time of one candidate over another, paired by round, from one `interleave`.

    Raises:
        ValueError: when the two were not timed in the same number of rounds.
    """
    if len(numerator.rounds) != len(denominator.rounds):
        raise ValueError(
            f"ratio: {numerator.name!r} has {len(numerator.rounds)} rounds and "
            f"{denominator.name!r} {len(denominator.rounds)}; take both from one interleave()"
        )
    paired = numerator.medians / denominator.medians
    draws = np.random.default_rng(seed).integers(0, paired.size, (resamples, paired.size))
    low, high = np.percentile(np.median(paired[draws], axis=1), (2.5, 97.5))
    return Ratio(float(np.median(paired)), float(low), float(high))


def fastest(samples: Mapping[str, Samples], names: Iterable[str]) -> str:
    """Which of ``names`` has the smallest median."""
    return min(names, key=lambda name: samples[name].median)


def relative_error(found: Any, reference: Any) -> tuple[float, float]:
    """(largest absolute difference, the same over the largest magnitude of the reference).

    Takes tensors, or equally long sequences of tensors, of which the worst counts. Compared in
    float64; any value that is not finite on one side only makes both figures infinite.

    Raises:
        ValueError: when counts or shapes differ.
    """
    if isinstance(found, torch.Tensor) and isinstance(reference, torch.Tensor):
        return _tensor_error(found, reference)
    if len(found) != len(reference):
        raise ValueError(f"outputs differ in number: {len(found)} against {len(reference)}")
    errors = [_tensor_error(f, r) for f, r in zip(found, reference, strict=True)]
    return max((e[0] for e in errors), default=0.0), max((e[1] for e in errors), default=0.0)


def _tensor_error(found: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    if found.shape != reference.shape:
        raise ValueError(
            f"outputs differ in shape: {tuple(found.shape)} against {tuple(reference.shape)}"
        )
    a, b = found.detach().cpu().double(), reference.detach().cpu().double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs())
    if not difference.isfinite().all():
        return math.inf, math.inf
    absolute = float(difference.max()) if difference.numel() else 0.0
    finite = b[b.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return absolute, absolute / scale if scale else (math.inf if absolute else 0.0)


def _settle(limit: float) -> None:
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        begin = time.process_time()
        time.sleep(_SLICE)
        if time.process_time() - begin < _SLICE / 5:
            return
