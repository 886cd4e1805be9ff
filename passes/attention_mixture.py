"""A recipe: each head has the pattern that costs it least, within a density for all."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsify.block_mask import BLOCK
from sparsify.calibration import Calibration
from sparsify.contracts import PassContext, PassResult
from sparsify.passes.attention_sites import attention_sites, measure
from sparsify.passes.pattern_attention import apply_patterns, check_options
from sparsify.passes.sites import as_patterns
from sparsify.patterns import Pattern, PerHead
from sparsify.program import Program, ProgramSet

_STEPS = 1000
Head = tuple[str, int]
"""A site's name and the number of a head."""


@dataclass(frozen=True)
class Cost:
    """Of one pattern for one head: both as in `HeadTrust`."""

    density: float
    error: float


@dataclass(frozen=True)
class AttentionMixture:
    """Of some patterns each head gets one, or all blocks, chosen by their errors on data.

    Before::

        y = fused_attention(q, k, v, mask, ...)

    After, as `PatternAttention` with a pattern for each head::

        y = block_attention(q, k, v, lists of PerHead((Strided(2, 8), None, ...)), mask, ...)

    The sum of all heads' errors is made as small as a mean density of ``density`` allows.

    Attributes:
        patterns: the candidates; reading all blocks is always one.
        density: pairs of query and key that are computed, over those that masks show, in the mean
            over all heads and layers.
        calibration: data on which densities and errors are measured.
        block, sites, budget_error: as in `PatternAttention`.

    Raises:
        ValueError: naming the attribute; when compiling, for a density below that of the sparsest
            candidates, for programs without attention whose keys are all known, and a
            `BudgetError` that names the layer and the head.
        TypeError: the calibration is none.

    Source: Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model
    Compression", 2024.
    """

    patterns: tuple[Pattern, ...]
    density: float
    calibration: Calibration
    block: int = BLOCK
    sites: tuple[str, ...] = ("*",)
    budget_error: float | None = None

    name: ClassVar[str] = "attention_mixture"
    tolerance: ClassVar[float] = float("inf")

    def __post_init__(self) -> None:
        check_options(self.name, self.block, self.budget_error, self.calibration)
        object.__setattr__(self, "sites", as_patterns(self.sites))
        if self.calibration is None:
            raise ValueError(f"{self.name}: patterns are chosen on data; give calibration")
        if not 0 < self.density <= 1:
            raise ValueError(f"{self.name}: density={self.density} must be above 0 and at most 1")
        if not self.patterns or any(pattern.per_head for pattern in self.patterns):
            raise ValueError(f"{self.name}: give patterns that are the same for every head")

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        if not any(map(attention_sites, programs)):
            raise ValueError(
                f"{self.name}: no program has attention whose keys are all known, as a forward "
                "program has; attention over the cache of a language model is not served: compile "
                "its forward pass with example inputs, or use PatternAttention for its prompts"
            )
        chosen = [self._chosen(program, context.disabled_sites) for program in programs]
        return apply_patterns(self, programs, chosen, context)

    def _chosen(self, program: Program, disabled: Collection[str]) -> dict[str, Pattern]:
        """A pattern of each site that does not read all."""
        sites = [
            site
            for site in attention_sites(program)
            if site.misfit(self.sites, self.block, disabled) is None
        ]
        if not sites:
            return {}
        everywhere = [{site.name: pattern for site in sites} for pattern in self.patterns]
        trusts = measure(program, self.calibration, everywhere, self.block)
        costs: dict[Head, list[Cost]] = {}
        for trust in trusts:
            for head in trust.heads():
                own = costs.setdefault((head.site, head.head), [])
                own.append(Cost(head.density, head.error))
        for own in costs.values():
            own.append(Cost(1.0, 0.0))
        taken = choose(costs, self.density)
        candidates = (*self.patterns, None)
        chosen = {
            site.name: PerHead(
                tuple(candidates[taken[site.name, head]] for head in range(site.heads))
            )
            for site in sites
        }
        return {name: mixed for name, mixed in chosen.items() if set(mixed.patterns) != {None}}


def choose(costs: Mapping[Head, Sequence[Cost]], density: float) -> dict[Head, int]:
    """The candidate of each head: the least sum of errors within a mean density.

    Densities are rounded up to steps of a thousandth; for these the choice is the best of all.

    Raises:
        ValueError: even the sparsest candidates are denser.
    """
    weights = {head: [math.ceil(c.density * _STEPS) for c in own] for head, own in costs.items()}
    budget = math.floor(density * _STEPS * len(costs))
    least = sum(map(min, weights.values()))
    if least > budget:
        raise ValueError(
            f"attention_mixture: density={density:g} is below {least / _STEPS / len(costs):.3g}, "
            "that of the sparsest patterns; give sparser ones, smaller blocks, or a higher density"
        )
    # best[n]: the least error of the heads so far with densities of n steps in all.
    best = torch.zeros(budget + 1, dtype=torch.float64)
    picked: list[torch.Tensor] = []
    for head, own in costs.items():
        options = torch.full((len(own), budget + 1), math.inf, dtype=torch.float64)
        for option, cost, weight in zip(options, own, weights[head], strict=True):
            if weight <= budget:
                option[weight:] = best[: budget + 1 - weight] + cost.error
        best, number = options.min(0)
        picked.append(number)
    taken: dict[Head, int] = {}
    for head, number in zip(reversed(list(costs)), reversed(picked), strict=True):
        taken[head] = int(number[budget])
        budget -= weights[head][taken[head]]
    return taken
