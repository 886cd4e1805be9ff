"""Attention over the paged cache against float64: few tokens in rows, many in lanes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import NEON, Isa
from sparsify.codegen.kernels.cpu.paged_decode import PagedDecode
from sparsify.codegen.kernels.cpu.paged_prefill import PagedPrefill
from sparsify.codegen.kernels.cpu.scores import Scores
from sparsify.layouts import LANES, Form
from sparsify.ops import PAGE, from_lanes, paged_attention

LAYERS = 2
FORMS: tuple[Form, ...] = ("rows", "lanes")


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    scores: Scores = field(default_factory=lambda: Scores(0.3, 0, 0.0))

    @property
    def features(self) -> int:
        """With five before and three after the query."""
        return self.heads * self.head_dim + 8

    def kernel(self, isa: Isa, form: Form) -> PagedDecode | PagedPrefill:
        heads = (self.heads, self.kv_heads, self.head_dim)
        if form == "rows":
            return PagedDecode(isa, *heads, self.features, 5, self.scores)
        vectors = {"avx512": 2, "avx2": 1, "neon": 4}[isa.name]
        return PagedPrefill(isa, *heads, self.features, 5, self.scores, vectors)


CASES = {
    "one key": Case(2, 2, 1, Scores(0.3, 1, 0.0)),
    "24": Case(4, 2, 24),
    "grouped": Case(9, 3, 64, Scores(0.125, 0, 0.0)),
    "wide": Case(4, 1, 256, Scores(0.0625, 0, 0.0)),
    "window": Case(4, 2, 24, Scores(0.3, 37, 0.0)),
    "softcap": Case(7, 1, 9, Scores(0.5, 100, 2.5)),
}

# (length, lengths, counts)
ROUNDS = [
    (1, [1], [1]),
    (1, [7, 16, 17], [1, 1, 1]),
    (1, [31, 0, 33, 5], [1, 0, 1, 0]),
    (1, [255, 256, 257], [1, 1, 1]),
    (3, [3, 65], [3, 1]),
    (8, [100], [8]),
    (1, [900], [1]),
    (2, [1500, 20], [2, 2]),
    (16, [16, 40], [16, 9]),
    (33, [33], [33]),
    (40, [100, 40, 0], [40, 20, 0]),
    (70, [200], [70]),
]


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    kernels = [case.kernel(width.isa, form) for case in CASES.values() for form in FORMS]
    return build(kernels, width.target)


@dataclass
class Operands:
    """A cache whose slots after each sequence's end are NaN, as are pages of no sequence."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def random(cls, case: Case, length: int, lengths: list[int], counts: list[int]) -> "Operands":
        batch, table = len(lengths), -(-max(lengths) // PAGE) + 1
        pool = batch * table + 3
        leading = (LAYERS, pool, case.kv_heads)
        keys = torch.full((*leading, case.head_dim, PAGE), math.nan)
        values = torch.full((*leading, PAGE, case.head_dim), math.nan)
        pages = torch.randperm(pool, dtype=torch.int32)[: batch * table].view(batch, table)
        for row, total in enumerate(lengths):
            for page in range(-(-total // PAGE)):
                used = min(PAGE, total - page * PAGE)
                place = int(pages[row, page])
                keys[:, place, ..., :used] = torch.randn(LAYERS, *leading[2:], case.head_dim, used)
                values[:, place, :, :used] = torch.randn(LAYERS, *leading[2:], used, case.head_dim)
        query = torch.randn(batch, length, case.features)
        for row, count in enumerate(counts):
            query[row, count:] = math.nan
        return cls(query, keys, values, pages, torch.tensor(lengths), torch.tensor(counts))

    def expected(self, case: Case) -> torch.Tensor:
        return paged_attention.reference(
            self.query.double(), self.keys.double(), self.values.double(), self.pages,
            self.lengths, self.counts, 1, case.heads, 5,
            case.scores.scale, case.scores.window, case.scores.softcap,
        )  # fmt: skip


@pytest.fixture(params=FORMS)
def attend(
    library: Any,
    width: Any,
    lanes: Callable[[torch.Tensor], torch.Tensor],
    request: pytest.FixtureRequest,
) -> Callable[..., torch.Tensor]:
    """Runs a case's kernel for rows, or that for lanes."""
    form: Form = request.param

    def run(case: Case, given: Operands, layer: int = 1) -> torch.Tensor:
        batch, length, _ = given.query.shape
        tokens, features = batch * length, case.heads * case.head_dim
        query = lanes(given.query) if form == "lanes" else given.query.flatten(0, 1)
        shape = (-(-tokens // LANES), features, LANES) if form == "lanes" else (tokens, features)
        inputs = [
            query, given.keys, given.values, given.pages,
            given.lengths, given.counts, layer, length,
        ]  # fmt: skip
        y = library(case.kernel(width.isa, form), inputs, shape, threads=(1, 2, 3))
        rows = from_lanes.reference(y, (tokens,)) if form == "lanes" else y
        return rows.view(batch, length, features)

    return run


def assert_close(found: torch.Tensor, expected: torch.Tensor, about: object) -> None:
    error = (found - expected).abs()
    assert bool((error <= 4e-6 * (1 + expected.abs())).all()), (about, float(error.max()))


@pytest.mark.parametrize("name", CASES)
def test_every_length(attend: Callable[..., torch.Tensor], name: str) -> None:
    case = CASES[name]
    for length, lengths, counts in ROUNDS:
        given = Operands.random(case, length, lengths, counts)
        found = attend(case, given)
        assert_close(found, given.expected(case), (length, lengths, counts))
        for row, count in enumerate(counts):
            assert not found[row, count:].any(), "padding is not zero"


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_flat_and_sharp_scores(attend: Callable[..., torch.Tensor], scale: float) -> None:
    """At 30 the scores differ by thousands, and one key takes all the weight."""
    case = CASES["24"]
    given = Operands.random(case, 1, [300, 40], [1, 1])
    given.query, given.keys = given.query * scale, given.keys * scale
    error = (attend(case, given) - given.expected(case)).abs().max()
    # fp32 scores of magnitude s carry errors of s * 2**-23, which the weights show.
    assert float(error) < 4e-6 + 1e-6 * scale**2


def test_later_keys_are_larger(attend: Callable[..., torch.Tensor]) -> None:
    """Every block, and every part, raises the maximum; earlier results are scaled down."""
    case = CASES["24"]
    given = Operands.random(case, 1, [700], [1])
    for page in range(700 // PAGE + 1):
        given.keys[:, given.pages[0, page]] *= page / 8
    assert_close(attend(case, given), given.expected(case), "rising")


def test_pages_before_the_window_may_be_gone(attend: Callable[..., torch.Tensor]) -> None:
    case = CASES["window"]
    given = Operands.random(case, 1, [100], [1])
    expected = given.expected(case)
    given.pages[0, :3] = -1
    assert_close(attend(case, given), expected, "evicted")


@pytest.mark.parametrize("wrong", ["page", "table", "count", "layer", "overflow", "underflow"])
def test_impossible_operands_are_refused(attend: Callable[..., torch.Tensor], wrong: str) -> None:
    case, layer = CASES["24"], 1
    given = Operands.random(case, 1, [40, 50], [1, 1])
    match wrong:
        case "page":
            given.pages[1, 2], message = given.keys.shape[1], "no page of the cache"
        case "table":
            given.lengths[0], message = 90, "longer than its row of the page table"
        case "count":
            given.counts[0], message = 2, "counts must lie between"
        case "layer":
            layer, message = -1, "no such layer"
        case "overflow":
            given.lengths[0], given.counts[0] = 2**63 - 1, -1
            message = "longer than its row of the page table"
        case "underflow":
            given.lengths[0], message = -(2**63), "fewer tokens than none"
    with pytest.raises((IndexError, ValueError), match=message):
        attend(CASES["24"], given, layer)


def test_names_tell_kernels_apart() -> None:
    kernels = [case.kernel(NEON, form) for case in CASES.values() for form in FORMS]
    assert len({kernel.name for kernel in kernels}) == len(kernels)


@pytest.mark.parametrize("form", FORMS)
def test_neon_has_vector_multiply_adds(assembly_for_neon: Callable[..., str], form: Form) -> None:
    assert "fmla\tv" in assembly_for_neon([CASES["softcap"].kernel(NEON, form)])
