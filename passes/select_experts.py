"""Binds the experts of mixtures to the layouts that the target runs fastest."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from sparsify import ops
from sparsify.contracts import ExpertsCostModel, PassContext, PassResult
from sparsify.layouts import Layout, Stack
from sparsify.ops import ExpertsShape
from sparsify.passes.graph import arguments, operand
from sparsify.passes.sites import (
    common_head,
    expert_stacks,
    is_disabled,
    named_weight,
    packed_name,
)
from sparsify.passes.sparse_linear import percent
from sparsify.passes.utilisation import Utilisation
from sparsify.program import ProgramSet
from sparsify.report import Decision
from sparsify.rewriter import Rewriter


@dataclass(frozen=True)
class SelectExperts:
    """The weights of a mixture's experts move from plain matrices to a layout of one target.

    Before::

        experts(x, e, w, [Wu], [Wd], "dense", "dense", ...)

    After::

        experts(x, e, w, [panels], [panels], "packed_dense{rows=16}", ...)

    Both projections get layouts of one kind, since what is between them is in the form that the
    kind computes in. The choice minimises the predicted time over every use in all entry programs,
    at the tokens that the example inputs let expect, spread evenly over the experts. Dense is one
    of the candidates, and stays where a sparse kind would be slower for a single token.
    Specialising: it needs a cost model.

    Attributes:
        layout: the name of a kind of layout to use wherever it fits, instead of choosing.
    """

    layout: str = ""

    name: ClassVar[str] = "select_experts"
    tolerance: ClassVar[float] = 1e-5

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        shared = dict(programs.weights)
        rewriters = [Rewriter(program, shared) for program in programs]
        uses: dict[tuple[str, ...], list[_Use]] = {}
        for rewriter in rewriters:
            for node in rewriter.nodes:
                if node.target == ops.experts.overload:
                    use = _Use(rewriter, node)
                    if all(rewriter.weight_of(w) is not None for w in use.weights):
                        uses.setdefault(use.names, []).append(use)
        decisions = [self._bind(group, context) for group in uses.values()]
        done = tuple(rewriter.finish() for rewriter in rewriters)
        return PassResult(ProgramSet(done), tuple(decisions))

    def _bind(self, uses: Sequence[_Use], context: PassContext) -> Decision:
        cost, first = context.cost, uses[0]
        if not isinstance(cost, ExpertsCostModel):
            raise ValueError(
                "select_experts chooses by predicted time but the context has no cost model that "
                "knows experts; specialise the program for a target"
            )
        densities = [float((w != 0).float().mean()) for w in first.matrices()]
        kinds: dict[str, _Choice] = {}
        for name in dict.fromkeys(c.name for s in first.stacks() for c in _layouts(cost, s)):
            kinds[name] = _choose(name, uses, densities, cost)
        dense = min((c for c in kinds.values() if c.is_dense), key=lambda c: c.seconds)
        sparse = min((c for c in kinds.values() if not c.is_dense), key=lambda c: c.seconds)
        nonzero = f"{percent(sum(densities) / 2)} nonzero"
        if is_disabled(first.site, context.disabled_sites):
            chosen, reason = dense, "switched off by the caller: dense"
        elif self.layout in kinds:
            chosen = kinds[self.layout]
            reason = f"{nonzero}: {self.layout} as the option layout={self.layout} says"
        else:
            chosen, reason = _faster(dense, sparse, nonzero)
        for use in uses:
            use.bind(chosen.stacks)
        told = "; ".join(use.utilisation(chosen, cost, densities).text for use in uses)
        nbytes = _nbytes(chosen.stacks, densities)
        shape = first.shape
        return Decision(
            first.site,
            "experts",
            "dense" if chosen.is_dense else "sparse",
            f"{reason}; {told}",
            self.name,
            shape=(shape.count, shape.out_features, shape.hidden, shape.in_features),
            density=sum(densities) / 2,
            layout=" + ".join(dict.fromkeys(s.layout.spec for s in chosen.stacks)),
            bytes_stored=nbytes,
            bytes_dense=4 * sum(s.count * s.rows * s.columns for s in chosen.stacks),
            predicted_seconds=chosen.seconds,
            dense_seconds=dense.seconds,
        )


@dataclass(frozen=True)
class _Choice:
    """The best layouts of one kind, the seconds of all uses, and those of one token each."""

    stacks: tuple[Stack, ...]
    seconds: float
    alone: float

    @property
    def is_dense(self) -> bool:
        return self.stacks[0].layout.is_dense


def _faster(dense: _Choice, sparse: _Choice, nonzero: str) -> tuple[_Choice, str]:
    names = [choice.stacks[0].layout.name for choice in (dense, sparse)]
    gain = dense.seconds / sparse.seconds
    if gain <= 1:
        return dense, f"{nonzero}: {names[0]} predicted {1 / gain:.1f}x faster than {names[1]}"
    if sparse.alone > dense.alone:
        loss = sparse.alone / dense.alone
        return dense, (
            f"{nonzero}: {names[1]} predicted {gain:.1f}x faster at the tokens expected, but "
            f"{loss:.1f}x slower for a single one"
        )
    return sparse, f"{nonzero}: {names[1]} predicted {gain:.1f}x faster than {names[0]}"


def _nbytes(stacks: Sequence[Stack], densities: Sequence[float]) -> int:
    """Of all experts."""
    return sum(
        stack.layout.estimate_nbytes(
            stack.shape, round(density * stack.count * stack.rows * stack.columns)
        )
        for stack, density in zip(stacks, densities, strict=True)
    )


def _density(stacks: Sequence[Stack], densities: Sequence[float]) -> float:
    """Share of nonzeros in all projections together."""
    sizes = [stack.count * stack.rows * stack.columns for stack in stacks]
    return sum(map(operator.mul, sizes, densities)) / sum(sizes)


def _layouts(cost: ExpertsCostModel, stack: Stack) -> tuple[Layout, ...]:
    return cost.expert_layouts((stack.rows, stack.columns))


def _choose(
    kind: str, uses: Sequence[_Use], densities: Sequence[float], cost: ExpertsCostModel
) -> _Choice:
    chosen, total, alone = [], 0.0, 0.0
    for number, (plain, density) in enumerate(zip(uses[0].stacks(), densities, strict=True)):
        parts = uses[0].shape.parts if number == 0 else 1

        def seconds(stack: Stack, parts: int = parts, density: float = density) -> float:
            return sum(
                cost.experts_seconds(stack, density, use.tokens_each, use.active * parts)
                for use in uses
            )

        stacks = [replace(plain, layout=x) for x in _layouts(cost, plain) if x.name == kind]
        best = min(stacks, key=seconds)
        chosen.append(best)
        total += seconds(best)
        alone += sum(
            cost.experts_seconds(best, density, 1.0, float(use.slots * parts)) for use in uses
        )
    return _Choice(tuple(chosen), total, alone)


@dataclass(frozen=True)
class _Use:
    """One call of one entry program."""

    rewriter: Rewriter
    node: fx.Node

    @property
    def options(self) -> dict[str, Any]:
        return arguments(self.node)

    @property
    def weights(self) -> tuple[fx.Node, ...]:
        return (*self.options["up"], *self.options["down"])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(named_weight(self.rewriter, w)[0] for w in self.weights)

    @property
    def site(self) -> str:
        """What the names of the weights have in common."""
        paths = [name.split(".") for _, name in expert_stacks(self.rewriter, self.node)]
        return ".".join(common_head(paths)) or self.node.name

    @property
    def shape(self) -> ExpertsShape:
        names = ("count", "out_features", "hidden", "in_features", "gated")
        return ExpertsShape(*(self.options[name] for name in names))

    @property
    def tokens(self) -> int:
        return ops.expected_tokens(operand(self.node).meta["val"])

    @property
    def slots(self) -> int:
        return int(self.options["experts"].meta["val"].shape[1])

    @property
    def active(self) -> float:
        """Experts with a token, when tokens are spread evenly."""
        count = self.shape.count
        return count * (1 - (1 - self.slots / count) ** self.tokens)

    @property
    def tokens_each(self) -> float:
        """Tokens of an active expert."""
        return self.tokens * self.slots / self.active

    def stacks(self) -> tuple[Stack, ...]:
        """As the weights are stored now."""
        return tuple(stack for stack, _ in expert_stacks(self.rewriter, self.node))

    def matrices(self) -> list[torch.Tensor]:
        """The weights of both projections, one matrix each."""
        found = []
        for stack, nodes in zip(
            self.stacks(), (self.options["up"], self.options["down"]), strict=True
        ):
            tensors = [named_weight(self.rewriter, node)[1] for node in nodes]
            found.append(stack.unpack(stack.named(tensors)))
        return found

    def bind(self, stacks: Sequence[Stack]) -> None:
        """Packs the weights, unless an earlier use has."""
        options = self.options
        before = expert_stacks(self.rewriter, self.node)
        for name, stack, (_, weight), plain in zip(
            ("up", "down"), stacks, before, self.matrices(), strict=True
        ):
            packed = stack.pack(plain)
            options[name] = [
                self.rewriter.add_weight(packed_name(weight, stack.layout, tensor), packed[tensor])
                for tensor in stack.layout.tensors
            ]
            options[f"{name}_layout"] = stack.layout.spec
        self.node.args = tuple(options.values())
        self.node.kwargs = {}

    def utilisation(
        self, chosen: _Choice, cost: ExpertsCostModel, densities: Sequence[float]
    ) -> Utilisation:
        up, down = chosen.stacks
        parts = (self.shape.parts, 1)
        seconds = sum(
            cost.experts_seconds(stack, density, self.tokens_each, self.active * part)
            for stack, density, part in zip((up, down), densities, parts, strict=True)
        )
        return Utilisation(
            self.shape,
            self.slots,
            self.tokens,
            self.active,
            seconds,
            cost.bytes_per_second,
            cost.flops_per_second,
            _nbytes(chosen.stacks, densities) / self.shape.count,
            _density(chosen.stacks, densities),
        )
