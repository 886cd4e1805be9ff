"""Selection of pages, their bounds, and attention over a selection, against plain references."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import NEON, Isa
from sparsify.codegen.kernels.cpu.page_bounds import PageBounds
from sparsify.codegen.kernels.cpu.paged_decode import PagedDecode
from sparsify.codegen.kernels.cpu.scores import Scores
from sparsify.codegen.kernels.cpu.select_pages import SelectPages
from sparsify.ops import PAGE, page_bounds, paged_attention, select_pages
from sparsify.selectors import page_selector

LAYERS, LAYER = 2, 1


@dataclass(frozen=True)
class Case:
    selector: str
    heads: int
    kv_heads: int
    head_dim: int
    budget: int
    sinks: int = 1
    recent: int = 1
    channels: int | None = None
    parts: int = 1

    @property
    def features(self) -> int:
        """With five before and three after the query."""
        return self.heads * self.head_dim + 8

    def select(self, isa: Isa) -> SelectPages:
        scoring = page_selector(self.selector).scoring
        assert scoring is not None
        return SelectPages(
            isa, self.heads, self.kv_heads, self.head_dim, self.features, 5,
            scoring, self.channels, self.parts, self.budget, self.sinks, self.recent,
        )  # fmt: skip

    def attend(self, isa: Isa) -> PagedDecode:
        heads = (self.heads, self.kv_heads, self.head_dim)
        return PagedDecode(isa, *heads, self.features, 5, Scores(0.3, 0, 2.5), True)


CASES = {
    "bounds": Case("page_bounds", 9, 3, 64, 8),
    "bounds of 4 keys": Case("page_bounds", 9, 3, 64, 8, parts=4),
    "odd bounds": Case("page_bounds", 4, 2, 7, 5, 2, 2, parts=2),
    "odd bounds of 4 keys": Case("page_bounds", 5, 1, 13, 6, parts=4),
    "one feature": Case("page_bounds", 2, 2, 1, 3),
    "parts of one feature": Case("page_bounds", 2, 2, 1, 3, parts=4),
    "many heads": Case("page_bounds", 7, 1, 33, 20, 0, 1),
    "exact": Case("exact", 4, 1, 24, 8, 0, 3),
    "channels": Case("channels", 6, 2, 24, 6, channels=5),
    "one channel": Case("channels", 4, 1, 24, 8, 0, 3, channels=1),
    "latest": Case("latest", 4, 2, 9, 4, 2, 1),
}

# (length, lengths, counts)
ROUNDS = [
    (1, [1], [1]),
    (1, [16, 17, 128, 129], [1, 1, 1, 1]),
    (1, [257, 0, 31, 1000], [1, 0, 1, 1]),
    (3, [300, 65], [3, 1]),
    (1, [4100], [1]),
]


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    shapes = {(case.kv_heads, case.head_dim, case.parts) for case in CASES.values()}
    kernels = [PageBounds(width.isa, *shape) for shape in shapes]
    for case in CASES.values():
        kernels += [case.select(width.isa), case.attend(width.isa)]
    return build({kernel.name: kernel for kernel in kernels}.values(), width.target)


@dataclass
class Operands:
    """A cache whose slots after each sequence's end are NaN, as are pages of no sequence."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tensors: list[torch.Tensor]
    pages: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def random(cls, case: Case, length: int, lengths: list[int], counts: list[int]) -> "Operands":
        batch, table = len(lengths), -(-max(lengths) // PAGE) + 1
        pool = batch * table + 3
        keys = torch.full((LAYERS, pool, case.kv_heads, case.head_dim, PAGE), math.nan)
        values = torch.full((LAYERS, pool, case.kv_heads, PAGE, case.head_dim), math.nan)
        pages = torch.randperm(pool, dtype=torch.int32)[: batch * table].view(batch, table)
        for row, total in enumerate(lengths):
            for page in range(-(-total // PAGE)):
                used, place = min(PAGE, total - page * PAGE), int(pages[row, page])
                keys[:, place, ..., :used].normal_()
                values[:, place, :, :used].normal_()
        query = torch.randn(batch, length, case.features)
        for row, count in enumerate(counts):
            query[row, count:] = math.nan
        given = cls(query, keys, values, [], pages, torch.tensor(lengths), torch.tensor(counts))
        if "bounds" in page_selector(case.selector).tensors:
            shape = (LAYERS, pool, case.kv_heads, 2, case.head_dim, case.parts)
            bounds = torch.full(shape, math.nan)
            page_bounds.reference(bounds, keys, pages, given.lengths, given.lengths, LAYER)
            given.tensors.append(bounds)
        if case.channels is not None:
            order = torch.stack([torch.randperm(case.head_dim) for _ in range(case.kv_heads)])
            given.tensors.append(order[:, : case.channels].int().contiguous())
        return given

    def selected(self, case: Case, exact: bool = False) -> torch.Tensor:
        given = [self.query, self.keys, *self.tensors]
        if exact:
            given = [t.double() if t.is_floating_point() else t for t in given]
        query, keys, *tensors = given
        return select_pages.reference(
            query, keys, tensors, self.pages, self.lengths, self.counts,
            LAYER, case.heads, 5, case.selector, case.budget, case.sinks, case.recent,
        )  # fmt: skip


Run = Callable[..., torch.Tensor]


@pytest.fixture
def select(library: Any, width: Any) -> Run:
    def run(case: Case, given: Operands, layer: int = LAYER) -> torch.Tensor:
        batch, length, _ = given.query.shape
        inputs = [
            given.query.flatten(0, 1), given.keys, *given.tensors, given.pages, given.lengths,
            given.counts, layer, length,
        ]  # fmt: skip
        shape = (batch, case.kv_heads, length, case.budget)
        return library(case.select(width.isa), inputs, shape, (1, 2), torch.int32)

    return run


@pytest.fixture
def attend(library: Any, width: Any) -> Run:
    def run(case: Case, given: Operands, selected: torch.Tensor) -> torch.Tensor:
        batch, length, _ = given.query.shape
        inputs = [
            given.query.flatten(0, 1), given.keys, given.values, given.pages, given.lengths,
            given.counts, selected, LAYER, length,
        ]  # fmt: skip
        y = library(case.attend(width.isa), inputs, (batch * length, case.heads * case.head_dim))
        return y.view(batch, length, -1)

    return run


@pytest.mark.parametrize("name", CASES)
def test_selection_and_attention_over_it(select: Run, attend: Run, name: str) -> None:
    case = CASES[name]
    for length, lengths, counts in ROUNDS:
        given = Operands.random(case, length, lengths, counts)
        found = select(case, given)
        # Random scores lie apart by more than rounding moves them.
        assert torch.equal(found, given.selected(case, exact=True)), (length, lengths, counts)
        y = attend(case, given, found)
        expected = paged_attention.reference(
            given.query.double(), given.keys.double(), given.values.double(), given.pages,
            given.lengths, given.counts, LAYER, case.heads, 5, 0.3, 0, 2.5, (), found,
        )  # fmt: skip
        assert bool(((y - expected).abs() <= 4e-6 * (1 + expected.abs())).all()), lengths
        for row, count in enumerate(counts):
            assert not y[row, count:].any(), "padding is not zero"


def test_of_equal_pages_the_earlier_are_read(select: Run) -> None:
    case = CASES["bounds"]
    given = Operands.random(case, 1, [500], [1])
    given.tensors[0].copy_(torch.tensor([-1.0, 1.0])[:, None, None].expand_as(given.tensors[0]))
    assert select(case, given)[0, 0, 0].tolist() == [*range(case.budget - 1), 31]


def test_a_page_with_a_key_like_the_query_is_read(select: Run) -> None:
    """Whichever of the query heads looks for it."""
    for name in ("bounds", "bounds of 4 keys", "exact", "many heads"):
        case = CASES[name]
        for head in range(case.heads):
            given = Operands.random(case, 1, [1000], [1])
            start = 5 + head * case.head_dim
            wanted = given.query[0, 0, start : start + case.head_dim] * 5
            kv_head = head * case.kv_heads // case.heads
            given.keys[LAYER, given.pages[0, 40], kv_head, :, 7] = wanted
            if given.tensors:
                page_bounds.reference(
                    given.tensors[0], given.keys, given.pages, given.lengths, given.lengths, LAYER
                )
            assert 40 in select(case, given)[0, kv_head, 0].tolist()


@pytest.mark.parametrize("scale", [0.0, 1e30, math.nan])
@pytest.mark.parametrize("name", ["bounds", "bounds of 4 keys"])
def test_whatever_the_query_the_lists_are_sound(
    select: Run, attend: Run, scale: float, name: str
) -> None:
    case = CASES[name]
    given = Operands.random(case, 1, [1000, 40], [1, 1])
    given.query *= scale
    found = select(case, given)
    assert bool((found[0].diff(dim=-1) > 0).all()) and int(found[0].min()) >= 0
    attend(case, given, found)  # refuses lists that are not


@pytest.mark.parametrize("name", ["bounds", "odd bounds", "odd bounds of 4 keys"])
def test_bounds_of_pages_that_tokens_fill(library: Any, width: Any, name: str) -> None:
    case = CASES[name]
    given = Operands.random(case, 1, [100, 16, 15, 64, 31], [1, 1, 1, 1, 1])
    counts = torch.tensor([70, 1, 15, 0, 16])
    bounds = torch.zeros_like(given.tensors[0])
    expected = bounds.clone()
    page_bounds.reference(expected, given.keys, given.pages, given.lengths, counts, LAYER)
    kernel = PageBounds(width.isa, case.kv_heads, case.head_dim, case.parts)
    inputs = [bounds, given.keys, given.pages, given.lengths, counts, LAYER, 70]
    found = library(kernel, inputs, (5,), (1, 2), torch.int64, changes=[bounds])
    assert torch.equal(found, given.lengths) and torch.equal(bounds, expected)
    written = bounds[LAYER].flatten(1).any(1)
    assert int(written.sum()) == 5 + 1 + 0 + 0 + 1


@pytest.mark.parametrize(
    "pages, message",
    [
        ([3, 2, 5, 6, 7, 8, 9, 10], "ascending"),
        ([0, 1, 2, 3, 4, 5, 6, 12], "none after the query's own"),
        ([0, -1, 2, -1, -1, -1, -1, -1], "ascending"),
        ([-2, 1, 2, 3, 4, 5, 6, 7], "ascending"),
    ],
)
def test_impossible_lists_are_refused(attend: Run, pages: list[int], message: str) -> None:
    case = CASES["bounds"]
    given = Operands.random(case, 1, [190], [1])
    lists = torch.tensor(pages, dtype=torch.int32).expand(1, case.kv_heads, 1, -1).contiguous()
    with pytest.raises(IndexError, match=message):
        attend(case, given, lists)


def test_impossible_operands_are_refused(select: Run) -> None:
    case = CASES["channels"]
    given = Operands.random(case, 1, [190], [1])
    with pytest.raises(IndexError, match="no such layer"):
        select(case, given, 2)
    given.tensors[0][1, 2] = case.head_dim
    with pytest.raises(IndexError, match="a channel is no feature"):
        select(case, given)
    given.pages[0, 3] = -1
    given.tensors[0][1, 2] = 0
    with pytest.raises(IndexError, match="no page of the cache"):
        select(case, given)


def test_names_tell_kernels_apart() -> None:
    kernels = {make(NEON) for case in CASES.values() for make in (case.select, case.attend)}
    assert len({kernel.name for kernel in kernels}) == len(kernels)


def test_neon_has_vector_multiply_adds(assembly_for_neon: Callable[..., str]) -> None:
    assert "fmla\tv" in assembly_for_neon([CASES["exact"].select(NEON)])
