"""The kernels of experts one after the other, against float64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sparsify.codegen.kernels.cpu.expert_combine import ExpertCombine
from sparsify.codegen.kernels.cpu.expert_dense import DenseExperts
from sparsify.codegen.kernels.cpu.expert_lanes import ExpertLanes
from sparsify.codegen.kernels.cpu.expert_plan import ExpertPlan
from sparsify.codegen.kernels.cpu.expert_sell import SellExperts
from sparsify.codegen.kernels.cpu.lanes import FromLanes
from sparsify.layouts import LANES, PackedDense, Sell, Stack
from sparsify.ops import ExpertsShape, experts

TOKENS = (1, 7, 8, 9, 31, 32, 33, 100)
SLOTS = 2


@dataclass(frozen=True)
class Mixture:
    """A layer of experts; the layouts are of SELL, None for the dense one of the machine."""

    shape: ExpertsShape
    activation: str
    bias: bool
    layouts: tuple[Sell, Sell] | None = None
    vectors: int = 1

    def stacks(self, isa: Any) -> tuple[Stack, Stack]:
        dense = PackedDense(isa.vector)
        first, second = self.layouts or (dense, dense)
        return self.shape.up(first), self.shape.down(second)

    def kernels(self, isa: Any) -> list[Any]:
        """In the order in which they run."""
        shape, (up, down) = self.shape, self.stacks(isa)
        combine = ExpertCombine(isa, shape.count, SLOTS, shape.out_features, down.pitch)
        if self.layouts is None:
            first = DenseExperts(isa, up, shape.gated, self.activation, self.bias, SLOTS)
            second = DenseExperts(isa, down, False, "none", self.bias, 0)
            return [ExpertPlan(shape.count, SLOTS), first, second, combine]
        wide = self.vectors * isa.vectors_per_group
        first = SellExperts(
            isa, up, shape.in_features, shape.gated, self.activation, self.bias, wide
        )
        second = SellExperts(isa, down, up.pitch, False, "none", self.bias, wide)
        lanes = ExpertLanes(isa, shape.count, SLOTS, shape.in_features)
        leave = FromLanes(isa, down.pitch)
        return [ExpertPlan(shape.count, SLOTS, LANES), lanes, first, second, leave, combine]


SMALL = ExpertsShape(5, 19, 37, 23, True)
WHOLE = ExpertsShape(3, 48, 32, 16, False)  # nothing is padded
MIXTURES = [
    Mixture(SMALL, "gelu", True),
    Mixture(WHOLE, "relu", False),
    Mixture(SMALL, "silu", True, (Sell(4, 9, 8), Sell(8, 64, 16)), 2),
    Mixture(WHOLE, "tanh", False, (Sell(4, 16, 32), Sell(4, 32, 48))),
]


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    kernels = {k.name: k for m in MIXTURES for k in m.kernels(width.isa)}
    return build(kernels.values(), width.target)


def spread(shape: ExpertsShape, tokens: int) -> torch.Tensor:
    """Each token's experts; some slots are not used, and the last expert has no token."""
    chosen = torch.rand(tokens, shape.count - 1).argsort(1)[:, :SLOTS].int()
    return chosen.masked_fill(torch.rand(tokens, SLOTS) < 0.15, -1)


def run(
    library: Any, isa: Any, mixture: Mixture, sent: torch.Tensor, threads: Sequence[int]
) -> None:
    """Runs the kernels on random numbers and compares with the reference."""
    shape, tokens = mixture.shape, len(sent)
    up, down = mixture.stacks(isa)
    keep = 0.4 if mixture.layouts else 1.0
    ups, downs = (
        torch.randn(s.count, s.rows, s.columns) * (torch.rand(s.count, s.rows, s.columns) < keep)
        for s in (up, down)
    )
    bias = [
        torch.randn(shape.count, shape.parts * shape.hidden),
        torch.randn(shape.count, shape.out_features),
    ]
    bias = bias if mixture.bias else []
    x, weights = torch.randn(tokens, shape.in_features), torch.rand(tokens, SLOTS)
    pairs = tokens * SLOTS
    plan, *middle, combine = mixture.kernels(isa)
    positions = pairs
    if mixture.layouts:
        positions = min(pairs, (pairs + (LANES - 1) * shape.count) // LANES) * LANES
    length = 2 * shape.count + positions + pairs
    order = library(plan, [sent, positions], (length,), dtype=torch.int32)
    value = x
    own = iter([(up.pack(ups), bias[:1]), (down.pack(downs), bias[1:])])
    for kernel in middle:
        groups = positions // LANES
        if isinstance(kernel, FromLanes):
            value = library(kernel, [value], (positions, down.pitch), threads)
        elif isinstance(kernel, ExpertLanes):
            value = library(kernel, [value, order], (groups, shape.in_features, LANES), threads)
        else:
            packed, added = next(own)
            pitch = kernel.stack.pitch
            form = (groups, pitch, LANES) if mixture.layouts else (positions, pitch)
            value = library(kernel, [value, order, *packed.values(), *added], form, threads)
    found = library(combine, [value, order, weights], (tokens, shape.out_features), threads)
    expected = experts.reference(
        x.double(), sent, weights.double(), [ups.flatten(0, 1).double()],
        [downs.flatten(0, 1).double()], [b.double() for b in bias], "dense", "dense", shape.count,
        shape.out_features, shape.hidden, shape.in_features, mixture.activation, shape.gated,
    )  # fmt: skip
    scale = expected.abs().max().clamp_min(1.0)
    assert (found - expected).abs().max() <= 3e-6 * scale, (mixture, tokens)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_token_count(library: Any, width: Any, mixture: Mixture) -> None:
    for tokens in TOKENS:
        run(library, width.isa, mixture, spread(mixture.shape, tokens), (1, 2, 3))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_all_tokens_to_one_expert_and_to_none(library: Any, width: Any, mixture: Mixture) -> None:
    for expert in (0, mixture.shape.count - 1, -1):
        sent = torch.tensor([[expert, -1]], dtype=torch.int32).repeat(45, 1)
        run(library, width.isa, mixture, sent, (1,))


def test_a_plan_sorts_pairs(library: Any) -> None:
    sent = torch.tensor([[3, 0], [-1, 3], [4, 0]], dtype=torch.int32)
    plan = library(ExpertPlan(5, 2), [sent, 6], (22,), dtype=torch.int32).tolist()
    assert plan[:5] == [0, 2, 2, 2, 4] and plan[5:10] == [2, 2, 2, 4, 5]
    assert plan[10:15] == [1, 5, 0, 3, 4]
    assert plan[16:] == [2, 0, -1, 3, 4, 1]


def test_an_expert_that_there_is_not_is_an_error(library: Any) -> None:
    for expert in (5, -2):
        sent = torch.tensor([[0, expert]], dtype=torch.int32)
        with pytest.raises(IndexError, match="sent to an expert that is none of 5"):
            library(ExpertPlan(5, 2), [sent, 2], (14,), dtype=torch.int32)


def test_panels_of_another_width_are_refused(width: Any) -> None:
    stack = SMALL.up(PackedDense(width.isa.vector * 2))
    with pytest.raises(ValueError, match=f"takes packed_dense{{rows={width.isa.vector}}}"):
        DenseExperts(width.isa, stack, True, "silu", False, 2)
