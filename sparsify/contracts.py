"""What passes are and what they may know: the contracts between passes, compiler and codegen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import fx

from sparsify.layouts import Form, Layout, Stack, WeightStats
from sparsify.program import ProgramSet
from sparsify.report import Decision
from sparsify.rewriter import Rewriter

Side = Literal["inputs", "outputs"]


@dataclass(frozen=True)
class Activity:
    """Zeros that a linear may skip.

    Attributes:
        side: whether they are among its inputs, or in the gate of its outputs.
        share: expected share of that side's features that are not zero in all tokens of a call.
    """

    side: Side
    share: float


class CostModel(Protocol):
    """Predicts kernel time; codegen implements it, passes only see this."""

    def linear_seconds(
        self, layout: Layout, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        """Seconds of ``y[tokens, rows] = x[tokens, cols] @ W.T`` with W stored in ``layout``."""
        ...

    def candidates(self, shape: tuple[int, int], nnz: int, tokens: int) -> tuple[Layout, ...]:
        """Layouts the target has kernels for at that token count, most promising first."""
        ...


@runtime_checkable
class SkippingCostModel(CostModel, Protocol):
    """A cost model of a target with kernels that skip zeros found at run time."""

    def active_seconds(
        self, layout: Layout, shape: tuple[int, int], tokens: int, activity: Activity
    ) -> float | None:
        """Seconds of a kernel that skips zeros; None where the layout has none that does."""
        ...

    def active_candidates(
        self, shape: tuple[int, int], tokens: int, activity: Activity
    ) -> tuple[Layout, ...]:
        """Layouts whose kernels skip such zeros."""
        ...


@runtime_checkable
class MeasuringCostModel(CostModel, Protocol):
    """A cost model that can time kernels on this machine instead.

    Attributes:
        predicted: the model that it asks where it has not measured.
    """

    predicted: CostModel

    def measure(self, weights: Iterable[tuple[torch.Tensor, Sequence[int]]]) -> None:
        """Times the most promising layouts of weights ``[rows, cols]`` at the token counts of
        their uses; from then on its answers about such weights are what it measured."""
        ...

    def measured_seconds(
        self, layout: Layout, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float | None:
        """The measured part of `linear_seconds`; None where it predicts."""
        ...


@runtime_checkable
class ExpertsCostModel(CostModel, Protocol):
    """A cost model that knows kernels for mixtures of experts."""

    bytes_per_second: float
    """What one may count on when weights come from memory."""
    flops_per_second: float
    """Of multiply-adds alone, on all threads."""

    def expert_layouts(self, shape: tuple[int, int]) -> tuple[Layout, ...]:
        """Layouts with kernels for experts whose matrices have this shape."""
        ...

    def experts_seconds(self, stack: Stack, density: float, tokens: float, active: float) -> float:
        """Seconds of the products of ``active`` of the stack's matrices with ``tokens`` each."""
        ...


@dataclass(frozen=True)
class MeasuredChoice:
    """What an earlier compilation chose for a weight by measuring.

    Attributes:
        layouts: specs, by the form of the activations.
        seconds: measured, of all uses of the weight together.
    """

    layouts: Mapping[Form, str]
    seconds: float


@dataclass(frozen=True)
class PassContext:
    """What a pass may know besides the programs."""

    cost: CostModel | None = None
    target: str = ""
    strict: bool = False
    disabled_sites: frozenset[str] = frozenset()
    measured: Mapping[str, MeasuredChoice] = field(default_factory=dict)
    """By site, for the same target: `select_layout` keeps to it."""
    unsupported: Callable[[fx.Node], str | None] | None = None
    """Why the target cannot compile an operator; codegen gives it, only `partition` asks."""


@dataclass(frozen=True)
class PassResult:
    programs: ProgramSet
    decisions: tuple[Decision, ...] = ()
    analysis: Mapping[str, WeightStats] = field(default_factory=dict)
    """Structure of the weights by site, from passes that measure."""


class Pass(Protocol):
    """A rewrite: a frozen dataclass whose fields are its options."""

    name: ClassVar[str]

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult: ...


@dataclass(frozen=True)
class GraphPass:
    """Base of passes that treat each entry program alone: implement `rewrite`."""

    name: ClassVar[str] = ""
    tolerance: ClassVar[float] = 0.0
    """Largest error relative to the output's scale that ``verify="numeric"`` accepts."""

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        decisions: list[Decision] = []
        done = []
        shared = dict(programs.weights)
        for program in programs:
            rewriter = Rewriter(program, shared)
            decisions.extend(self.rewrite(rewriter, context))
            done.append(rewriter.finish())
        return PassResult(ProgramSet(tuple(done)), tuple(decisions))

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        """Edits ``rewriter.graph`` in place; returns what was decided."""
        raise NotImplementedError
