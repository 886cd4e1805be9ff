"""Measured choice: a cost model that timed the most promising layouts of each weight.

for each distinct (shape, share of nonzeros, token counts):
  predict the candidates, keep the best few and the best dense one
  pack the weight in each; build all their kernels into one library
  time them in turns, and remember the seconds on disk
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsify.codegen.measurements import Measurements, kernel_sources
from sparsify.codegen.target import host_model
from sparsify.codegen.timing import in_turns
from sparsify.contracts import Activity
from sparsify.layouts import Layout, Stack, WeightStats

if TYPE_CHECKING:
    from sparsify.codegen.cost import CpuCostModel
    from sparsify.codegen.trial import Trial, TrialLibrary


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        layouts: how many of the candidates, the best by prediction at each token count.
        rounds, seconds: how often each is timed, and for how long.
    """

    layouts: int
    rounds: int
    seconds: float


EFFORTS = {"quick": Effort(3, 5, 0.004), "full": Effort(16, 15, 0.01)}

_Key = tuple[tuple[int, int], str]
"""Shape, and share of nonzeros to two digits."""


@dataclass(frozen=True)
class _Job:
    """One weight's layouts, to be timed at some token counts."""

    weight: torch.Tensor
    shape: tuple[int, int]
    share: str
    tokens: tuple[int, ...]
    layouts: tuple[Layout, ...]

    def trials(self) -> list[Trial]:
        from sparsify.codegen.trial import Trial

        return [Trial(layout, self.shape, n) for layout in self.layouts for n in self.tokens]


class TunedCostModel:
    """A `CostModel` that answers with measured times where it has measured."""

    def __init__(self, predicted: CpuCostModel, effort: Effort, measurements: Measurements) -> None:
        self.predicted = predicted
        self.effort = effort
        self.measurements = measurements
        self._times: dict[_Key, dict[int, dict[Layout, float]]] = {}

    def measure(self, weights: Iterable[tuple[torch.Tensor, Sequence[int]]]) -> None:
        """Times the layouts of weights at the token counts of their uses.

        Weights that agree in shape, share of nonzeros and token counts are measured once.
        """
        jobs: dict[Any, _Job] = {}
        for weight, tokens in weights:
            stats = WeightStats.of(weight)
            counts = tuple(sorted(set(tokens)))
            key = (stats.shape, _share(stats.shape, stats.nnz), counts)
            if key not in jobs:
                jobs[key] = _Job(weight, *key, self._shortlist(stats, counts))
        missing = []
        # Where token counts overlap, the answer of the weight that was measured at more stays.
        for job in sorted(jobs.values(), key=lambda job: len(job.tokens)):
            if not self._recall(job):
                missing.append(job)
        if missing:
            with self.measurements.alone():
                # Whoever was first has measured what both need.
                self._run([job for job in missing if not self._recall(job)])

    def linear_seconds(
        self, layout: Layout, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        measured = self.measured_seconds(layout, shape, nnz, tokens)
        if measured is not None:
            return measured
        return self.predicted.linear_seconds(layout, shape, nnz, tokens)

    def active_seconds(
        self, layout: Layout, shape: tuple[int, int], tokens: int, activity: Activity
    ) -> float | None:
        return self.predicted.active_seconds(layout, shape, tokens, activity)

    def active_candidates(
        self, shape: tuple[int, int], tokens: int, activity: Activity
    ) -> tuple[Layout, ...]:
        return self.predicted.active_candidates(shape, tokens, activity)

    def candidates(self, shape: tuple[int, int], nnz: int, tokens: int) -> tuple[Layout, ...]:
        """What was measured: a prediction is no match for it."""
        found = self._times.get((shape, _share(shape, nnz)), {}).get(tokens)
        return tuple(found or self.predicted.candidates(shape, nnz, tokens))

    def measured_seconds(
        self, layout: Layout, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float | None:
        """None where nothing was measured."""
        found = self._times.get((shape, _share(shape, nnz)), {})
        return found.get(tokens, {}).get(layout)

    @property
    def bytes_per_second(self) -> float:
        return self.predicted.bytes_per_second

    @property
    def flops_per_second(self) -> float:
        return self.predicted.flops_per_second

    def expert_layouts(self, shape: tuple[int, int]) -> tuple[Layout, ...]:
        return self.predicted.expert_layouts(shape)

    def experts_seconds(self, stack: Stack, density: float, tokens: float, active: float) -> float:
        """Predicted: experts are not measured."""
        return self.predicted.experts_seconds(stack, density, tokens, active)

    def _shortlist(self, stats: WeightStats, tokens: Sequence[int]) -> tuple[Layout, ...]:
        chosen: dict[Layout, None] = {}
        for count in tokens:
            fitting = [
                layout
                for layout in self.predicted.candidates(stats.shape, stats.nnz, count)
                if layout.fits(stats) is None
            ]

            def seconds(layout: Layout, count: int = count) -> float:
                return self.predicted.linear_seconds(layout, stats.shape, stats.nnz, count)

            fitting.sort(key=seconds)
            dense = [layout for layout in fitting if layout.is_dense]
            chosen.update(dict.fromkeys((*fitting[: self.effort.layouts], *dense[:1])))
        return tuple(chosen)

    def _recall(self, job: _Job) -> bool:
        """Takes the job's times from disk, if they are there."""
        found = self.measurements.find(*self._identity(job))
        if found is None or any(len(times) != len(job.tokens) for times in found.values()):
            return False
        if found.keys() != {layout.spec for layout in job.layouts}:
            return False
        self._note(job, {layout: found[layout.spec] for layout in job.layouts})
        return True

    def _note(self, job: _Job, times: Mapping[Layout, Sequence[float]]) -> None:
        by_tokens = self._times.setdefault((job.shape, job.share), {})
        for i, count in enumerate(job.tokens):
            by_tokens[count] = {layout: found[i] for layout, found in times.items()}

    def _identity(self, job: _Job) -> tuple[str, ...]:
        """All that the job's times depend on."""
        import tvm

        target = self.predicted.target
        kernels = sorted(
            f"{trial.layout.spec} {trial.tokens}: {kernel.name}"
            for trial in job.trials()
            for kernel in trial.kernels(target)
        )
        return (
            *kernels,
            f"{job.shape}, {job.share} nonzero, {job.tokens} tokens",
            repr(self.effort),
            f"{self.predicted.threads} threads of {host_model()}",
            "weights from a cache" if self.predicted.resident else "weights from memory",
            repr(target),
            f"tvm {tvm.__version__}",
            kernel_sources(),
        )

    def _run(self, jobs: Sequence[_Job]) -> None:
        from sparsify.codegen.trial import TrialLibrary

        if not jobs:
            return
        trials = {trial: None for job in jobs for trial in job.trials()}
        with _progress(len(jobs)) as advance:
            library = TrialLibrary(self.predicted.target, trials)
            for job in jobs:
                times = self._time(job, library)
                self._note(job, times)
                kept = {layout.spec: found for layout, found in times.items()}
                self.measurements.keep(kept, *self._identity(job))
                advance()

    def _time(self, job: _Job, library: TrialLibrary) -> dict[Layout, tuple[float, ...]]:
        from sparsify.codegen.runtime import pool

        generator = torch.Generator().manual_seed(0)
        packed = {layout: layout.pack(job.weight.detach()) for layout in job.layouts}
        found: dict[Layout, list[float]] = {layout: [] for layout in job.layouts}
        resident = self.predicted.resident
        for count in job.tokens:
            x = torch.randn(count, job.shape[1], generator=generator)
            calls = {
                trial.layout: library.bind(trial, packed[trial.layout], x, resident)[0]
                for trial in job.trials()
                if trial.tokens == count
            }
            with pool.use_threads(self.predicted.threads):
                times = in_turns(calls, self.effort.rounds, self.effort.seconds)
            for layout, seconds in times.items():
                found[layout].append(seconds)
        return {layout: tuple(times) for layout, times in found.items()}


def _share(shape: tuple[int, int], nnz: int) -> str:
    return f"{nnz / max(1, shape[0] * shape[1]):.1e}"


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on stderr, on a terminal only; yields what moves it on by one."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("measuring layouts", total=total)
        yield lambda: bar.advance(task)
