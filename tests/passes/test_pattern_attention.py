"""Patterns: what they keep, what recipes make of them, and what they refuse."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsify.calibration import Calibration
from sparsify.contracts import PassContext
from sparsify.frontend.torch import import_torch
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.attention_mixture import AttentionMixture, Cost, choose
from sparsify.passes.attention_trust import BudgetError
from sparsify.passes.pattern_attention import PatternAttention
from sparsify.patterns import (
    Dilated,
    Lines,
    Pattern,
    PerHead,
    PowersOfTwo,
    Sharded,
    Strided,
    WindowSinks,
)
from sparsify.program import ProgramSet

HEADS, D, BLOCK = 4, 32, 32
PATTERNS = [
    WindowSinks(1, 1),
    Strided(0, 3),
    Dilated(2, 3),
    PowersOfTwo(0, 1),
    Lines((0, 2), (1, 3)),
    Sharded(3, 0),
    PerHead((None, Strided(1, 4), Strided(1, 4), WindowSinks(0, 1))),
]


def by_hand(pattern: Pattern, q: int, k: int, h: int) -> bool:
    """The rules once more, one block at a time."""
    d = abs(q - k)
    if q == k:
        return True
    match pattern:
        case WindowSinks(window, sinks):
            return d <= window or k < sinks
        case Strided(window, stride):
            return d <= window or (k + 1) % stride == 0
        case Dilated(step, reach):
            return d in range(0, step * reach + 1, step)
        case PowersOfTwo(window, sinks):
            return d in [2**n for n in range(20)] or d <= window or k < sinks
        case Lines(verticals, slashes):
            return k in verticals or d in slashes
        case Sharded(shards, window):
            return k % shards == h % shards or d <= window
        case PerHead(patterns):
            own = patterns[h]
            return own is None or by_hand(own, q, k, 0)
    raise AssertionError(pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
@pytest.mark.parametrize("blocks", [1, 2, 9, 17])
def test_patterns_keep_what_their_rules_say(pattern: Pattern, blocks: int) -> None:
    marks = pattern.marks(blocks, HEADS)
    assert marks.shape == (HEADS if pattern.per_head else 1, blocks, blocks)
    for h, q, k in torch.cartesian_prod(*map(torch.arange, marks.shape)).tolist():
        assert bool(marks[h, q, k]) == by_hand(pattern, q, k, h), (h, q, k)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (
            p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return x + self.o(y.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """A layer with a mask of keys, and a causal one with a window."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(), Layer()

    def masks(self, x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.arange(x.shape[1])
        distance = at[:, None] - at
        return keep[:, None, None], (distance >= 0) & (distance < 100)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        keys, band = self.masks(x, keep)
        return self.second(self.first(x, keys), band)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


@pytest.fixture(scope="module")
def programs(encoder: Encoder) -> ProgramSet:
    example = torch.randn(2, 70, D), torch.ones(2, 70, dtype=torch.bool)
    return run_pipeline(import_torch(encoder, example), PORTABLE).programs


@pytest.fixture(scope="module")
def data() -> Calibration:
    torch.manual_seed(1)
    keep = torch.ones(1, 200, dtype=torch.bool)
    return Calibration([(torch.randn(1, 200, D), keep), (torch.randn(1, 90, D), keep[:, :90])])


def masked(encoder: Encoder, pattern: Pattern, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """What the module gives when its masks hide what the pattern drops."""
    place = torch.arange(x.shape[1]) // BLOCK
    kept = pattern.marks(int(place[-1]) + 1, HEADS)[:, place[:, None], place]
    keys, band = encoder.masks(x, keep)
    return encoder.second(encoder.first(x, keys & kept), band & kept)


@pytest.mark.parametrize("pattern", [Strided(0, 3), PATTERNS[-1]], ids=["all", "per-head"])
def test_programs_compute_what_the_pattern_keeps(
    pattern: Pattern, encoder: Encoder, programs: ProgramSet
) -> None:
    result = PatternAttention(pattern, block=BLOCK).run(programs, PassContext())
    program = result.programs["forward"]
    targets = [str(n.target) for n in program.graph.nodes]
    assert sum("block_attention" in t for t in targets) == 2
    assert not any("fused_attention" in t for t in targets)
    for batch, length in ((1, 1), (2, 33), (1, 64), (3, 131)):
        x, keep = torch.randn(batch, length, D), torch.rand(batch, length) < 0.8
        keep[:, 0] = True
        expected = masked(encoder, pattern, x, keep)
        torch.testing.assert_close(program.run(x, keep), expected, atol=1e-5, rtol=1e-5)
    sites = [d.site for d in result.decisions]
    assert sites == ["first", "second"]
    assert all("not known without calibration" in d.reason for d in result.decisions)


def test_an_example_of_one_block_serves_any_length(encoder: Encoder) -> None:
    example = torch.randn(2, 20, D), torch.ones(2, 20, dtype=torch.bool)
    programs = run_pipeline(import_torch(encoder, example), PORTABLE).programs
    pattern = Sharded(3, 0)
    result = PatternAttention(pattern, block=BLOCK).run(programs, PassContext())
    program = result.programs["forward"]
    lists = {
        str(node.meta["val"].shape[2])
        for node in program.graph.nodes
        if "list_blocks" in str(node.target)
    }
    assert lists and "1" not in lists
    for length in (1, 32, 131):
        x, keep = torch.randn(2, length, D), torch.ones(2, length, dtype=torch.bool)
        expected = masked(encoder, pattern, x, keep)
        torch.testing.assert_close(program.run(x, keep), expected, atol=1e-5, rtol=1e-5)


def test_measured_figures_are_in_the_report(programs: ProgramSet, data: Calibration) -> None:
    recipe = PatternAttention(WindowSinks(0, 1), block=BLOCK, calibration=data, sites=("first",))
    result = recipe.run(programs, PassContext())
    site, *heads, second = result.decisions
    assert site.site == "first" and len(heads) == HEADS
    for decision in (site, *heads):
        assert 0 < decision.density < 1 and 0 < decision.mass < 1 and decision.error > 0
    assert second.verdict == "skipped" and "the recipe is for first" in second.reason
    # The own block and the first, of rows of 32 queries, then of 8 and of 26.
    pairs = 32 * 32 + 5 * 32 * 64 + 8 * 40 + 32 * 32 + 32 * 64 + 26 * 58
    assert site.density == pytest.approx(pairs / (200 * 200 + 90 * 90))


def test_a_budget_refuses_and_names_layer_and_head(programs: ProgramSet, data: Calibration) -> None:
    options = {"block": BLOCK, "calibration": data}
    with pytest.raises(BudgetError, match=r"pattern_attention: head \d of (first|second) changes"):
        PatternAttention(WindowSinks(0, 0), budget_error=1e-3, **options).run(
            programs, PassContext()
        )
    wide = PatternAttention(WindowSinks(9, 0), budget_error=1e-3, **options)
    assert all(d.error < 1e-6 for d in wide.run(programs, PassContext()).decisions)


def test_a_mixture_keeps_to_its_density(programs: ProgramSet, data: Calibration) -> None:
    candidates = WindowSinks(0, 1), Strided(1, 3), WindowSinks(2, 1)
    errors = []
    for density in (0.6, 0.8):
        recipe = AttentionMixture(candidates, density, data, block=BLOCK)
        result = recipe.run(programs, PassContext())
        heads = [d for d in result.decisions if d.operator == "attention head"]
        skipped = [d for d in result.decisions if d.verdict == "skipped"]
        dense = HEADS * len(skipped)
        total = sum(d.density for d in heads) + dense
        assert total / (2 * HEADS) <= density + 1e-9
        errors.append(sum(d.error for d in heads))
    assert errors[1] < errors[0]
    with pytest.raises(ValueError, match="that of the sparsest patterns"):
        AttentionMixture(candidates, 0.01, data, block=BLOCK).run(programs, PassContext())


def test_the_choice_is_the_best_of_all() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        costs = {
            ("site", head): [Cost(d, float(torch.rand(())) * (1 - d)) for d in (0.1, 0.3, 1.0)]
            for head in range(4)
        }
        taken = choose(costs, 0.4)
        assert sum(costs[h][n].density for h, n in taken.items()) <= 1.6 + 1e-9
        found = sum(costs[h][n].error for h, n in taken.items())
        every = torch.cartesian_prod(*[torch.arange(3)] * 4).tolist()
        best = min(
            sum(own[n].error for own, n in zip(costs.values(), numbers, strict=True))
            for numbers in every
            if sum(own[n].density for own, n in zip(costs.values(), numbers, strict=True)) <= 1.6
        )
        assert found == pytest.approx(best)


@dataclass(frozen=True)
class Sorted(Pattern):
    name = "sorted"

    def keep(self, query: torch.Tensor, key: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return torch.cat([query, query], 1).sum(1, keepdim=True) > key


@dataclass(frozen=True)
class Branching(Sorted):
    def keep(self, query: torch.Tensor, key: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return key > query if bool((key > 1).any()) else key < query


@dataclass(frozen=True)
class LastOnes(Sorted):
    def keep(self, query: torch.Tensor, key: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return key >= query.shape[-2] - 5


@dataclass(frozen=True)
class Largest(Sorted):
    def keep(self, query: torch.Tensor, key: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return query >= key.max()


@dataclass(frozen=True)
class Summed(Sorted):
    def keep(self, query: torch.Tensor, key: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return query >= key.cumsum(-1)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (Sorted(), r"aten\.cat\.default is not elementwise"),
        (Largest(), r"aten\.max\.default is not elementwise"),
        (Summed(), r"aten\.cumsum\.default is not elementwise"),
        (LastOnes(), "does something else where there are 5 blocks"),
        (Branching(), "without branches on the values"),
    ],
    ids=["cat", "max", "cumsum", "shape", "branch"],
)
def test_rules_that_are_not_elementwise_are_refused(
    pattern: Pattern, message: str, programs: ProgramSet
) -> None:
    with pytest.raises(ValueError, match=f"pattern sorted.*{message}"):
        PatternAttention(pattern, block=BLOCK).run(programs, PassContext())


def test_what_patterns_and_recipes_refuse(programs: ProgramSet) -> None:
    with pytest.raises(ValueError, match="strided: stride=0 must be at least 1"):
        Strided(1, 0)
    with pytest.raises(ValueError, match=r"window=1\.5 must count blocks"):
        WindowSinks(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block=40"):
        PatternAttention(Strided(), block=40)
    with pytest.raises(ValueError, match="give calibration"):
        PatternAttention(Strided(), budget_error=0.1)
    with pytest.raises(TypeError, match="pattern_attention: calibration must be"):
        PatternAttention(Strided(), calibration=[torch.ones(1)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="attention_mixture: calibration must be"):
        AttentionMixture((Strided(),), 0.5, [torch.ones(1)])  # type: ignore[arg-type]
    linear = run_pipeline(import_torch(nn.Linear(4, 4), (torch.randn(2, 4),)), PORTABLE).programs
    with pytest.raises(ValueError, match="no program has attention that was recognised"):
        PatternAttention(Strided()).run(linear, PassContext())


def test_sites_that_are_switched_off_read_all(programs: ProgramSet, data: Calibration) -> None:
    context = PassContext(disabled_sites=frozenset({"sec*"}))
    for recipe in (
        PatternAttention(WindowSinks(0, 1), block=BLOCK),
        AttentionMixture((WindowSinks(0, 1),), 0.9, data, block=BLOCK),
    ):
        result = recipe.run(programs, context)
        (second,) = [d for d in result.decisions if d.site == "second"]
        assert second.verdict == "skipped" and "switched off" in second.reason
        targets = [str(n.target) for n in result.programs["forward"].graph.nodes]
        assert any("fused_attention" in t for t in targets)


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.q(x)[:, None]
        memory = query[:, :, :5]
        return F.scaled_dot_product_attention(query, memory, memory)[:, 0]


def test_two_lengths_have_no_pattern() -> None:
    programs = run_pipeline(import_torch(Cross(), (torch.randn(1, 9, 16),)), PORTABLE).programs
    (decision,) = PatternAttention(Strided()).run(programs, PassContext()).decisions
    assert decision.verdict == "skipped" and "differ in number" in decision.reason
