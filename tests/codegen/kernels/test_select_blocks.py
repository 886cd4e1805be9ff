"""Selection of blocks of keys for blocks of queries, against the plain reference in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import NEON, Isa
from sparsify.codegen.kernels.cpu.paged_prefill import PagedPrefill
from sparsify.codegen.kernels.cpu.scores import Scores
from sparsify.codegen.kernels.cpu.select_blocks import SelectBlocks
from sparsify.layouts import LANES
from sparsify.ops import PAGE, below_maximum, from_lanes, paged_attention, select_blocks
from sparsify.selectors import block_selector
from tests.codegen.kernels.test_select_pages import LAYER, Case, Operands


@dataclass(frozen=True)
class Blocks:
    selector: str
    heads: int
    kv_heads: int
    head_dim: int
    block: tuple[int, int] = (64, 4)
    density: float = 0.3
    mass: float = 0.0
    sinks: int = 1
    recent: int = 1
    patterns: tuple[int, ...] = ()

    @property
    def features(self) -> int:
        return self.heads * self.head_dim + 8

    def kernel(self, isa: Isa) -> SelectBlocks:
        selector = block_selector(self.selector)
        assert selector.scoring is not None
        return SelectBlocks(
            isa, self.heads, self.kv_heads, self.head_dim, self.features, 5, 0.3,
            selector.scoring, "gates" in selector.tensors, self.block, self.density, self.mass,
            self.sinks, self.recent,
        )  # fmt: skip

    def tensors(self) -> list[torch.Tensor]:
        given = {
            "gates": torch.randn(self.heads, self.head_dim, self.head_dim),
            "patterns": torch.tensor(self.patterns, dtype=torch.int32),
        }
        return [given[name] for name in block_selector(self.selector).tensors]

    def operands(self, length: int, lengths: list[int], counts: list[int]) -> Operands:
        pages = Case("latest", self.heads, self.kv_heads, self.head_dim, 4)
        given = Operands.random(pages, length, lengths, counts)
        given.tensors = self.tensors()
        return given


CASES = {
    "pooled": Blocks("pooled", 6, 2, 24),
    "mass": Blocks("pooled", 2, 1, 7, (16, 2), 0.9, 0.4, 0, 2),
    "gate": Blocks("block_gate", 4, 4, 9, (64, 1), 0.2),
    "lines": Blocks("vertical_slash", 6, 3, 24),
    "aware": Blocks("query_aware", 6, 2, 24),
    "aware of mass": Blocks("query_aware", 2, 1, 7, (16, 2), 0.9, 0.4, 0, 2),
    "near": Blocks("a_shape", 3, 1, 5, (16, 2), 0.4),
    "near of mass": Blocks("a_shape", 2, 2, 8, (64, 1), 0.7, 0.6, 2, 1),
    "patterns": Blocks("head_patterns", 6, 2, 24, patterns=(0, 1, 1, 2, 0, 0)),
    "patterns of mass": Blocks(
        "head_patterns", 7, 7, 9, (16, 1), 0.9, 0.4, 1, 2, (2, 0, 1, 0, 1, 1, 2)
    ),
    "lines of mass": Blocks("vertical_slash", 1, 1, 33, (128, 3), 0.5, 0.3, 2, 1),
}

# (length, lengths, counts)
ROUNDS = [
    (16, [16, 40], [16, 9]),
    (33, [33], [33]),
    (70, [200, 70, 0], [70, 50, 0]),
    (512, [1500], [512]),
]


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    return build([case.kernel(width.isa) for case in CASES.values()], width.target)


@pytest.mark.parametrize("name", CASES)
def test_every_length(
    library: Any, width: Any, lanes: Callable[[torch.Tensor], torch.Tensor], name: str
) -> None:
    case = CASES[name]
    for length, lengths, counts in ROUNDS:
        given = case.operands(length, lengths, counts)
        rows, columns = -(-length // case.block[0]), -(-given.pages.shape[1] // case.block[1])
        inputs = [
            lanes(given.query), given.keys, *given.tensors, given.pages, given.lengths,
            given.counts, LAYER, length,
        ]  # fmt: skip
        shape = (len(lengths), case.heads, rows, columns)
        found = library(case.kernel(width.isa), inputs, shape, (1, 2), torch.int32)
        expected = select_blocks.reference(
            given.query.double(), given.keys.double(), [t.double() for t in given.tensors],
            given.pages, given.lengths, given.counts, LAYER, case.heads, 5, 0.3, case.selector,
            case.block, case.density, case.mass, case.sinks, case.recent,
        )  # fmt: skip
        # Weights of random operands lie apart by more than rounding moves them, but for few.
        rows_equal = (found == expected).all(-1)
        assert float(rows_equal.double().mean()) >= 0.97, (lengths, counts)
        counts_of = ((found >= 0).sum(-1) - (expected >= 0).sum(-1)).abs()
        assert int(counts_of.max()) <= (1 if case.mass else 0)


def test_the_density_is_kept(library: Any, width: Any, lanes: Callable[..., Any]) -> None:
    case = CASES["pooled"]
    given = case.operands(512, [4096], [512])
    inputs = [
        lanes(given.query), given.keys, given.pages, given.lengths, given.counts, LAYER, 512,
    ]  # fmt: skip
    found = library(case.kernel(width.isa), inputs, (1, 6, 8, 65), dtype=torch.int32)
    for row in range(8):
        blocks = (4096 - 512 + 64 * (row + 1)) // (4 * PAGE)
        listed = found[0, :, row]
        assert bool(((listed >= 0).sum(-1) == round(blocks * 0.3)).all())
        assert bool((listed == 0).any(-1).all()) and bool((listed == blocks - 1).any(-1).all())


def test_of_equal_blocks_the_earlier_have_the_mass(
    library: Any, width: Any, lanes: Callable[..., Any]
) -> None:
    case = CASES["mass"]
    given = case.operands(33, [33 + 15 * 32], [33])
    given.keys[...] = 0.25
    inputs = [
        lanes(given.query), given.keys, given.pages, given.lengths, given.counts, LAYER, 33,
    ]  # fmt: skip
    columns = -(-given.pages.shape[1] // case.block[1])
    found = library(case.kernel(width.isa), inputs, (1, 2, 3, columns), dtype=torch.int32)
    for row, first in enumerate((480, 496, 512)):
        blocks = min(first + 15, 512) // 32 + 1
        own = list(range(max(first // 32 - 1, 0), blocks))
        # Of equal weights, 0.4 of the mass is in so many blocks; those always read come first.
        earlier = list(range(-(-blocks * 2 // 5) - len(own)))
        expected = [*earlier, *own]
        for head in range(2):
            listed = found[0, head, row]
            assert listed[listed >= 0].tolist() == expected


def test_a_head_without_a_pattern_is_refused(
    library: Any, width: Any, lanes: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    case = CASES["patterns"]
    given = case.operands(16, [40], [16])
    for wrong in (-1, 3):
        given.tensors[0][4] = wrong
        inputs = [
            lanes(given.query), given.keys, *given.tensors, given.pages, given.lengths,
            given.counts, LAYER, 16,
        ]  # fmt: skip
        with pytest.raises(ValueError, match="patterns must be at least 0 and below 3"):
            library(case.kernel(width.isa), inputs, (1, 6, 1, 1), dtype=torch.int32)
        with pytest.raises(ValueError, match=f"has the pattern {wrong}; there are 0 a_shape"):
            select_blocks.reference(
                given.query, given.keys, given.tensors, given.pages, given.lengths, given.counts,
                LAYER, case.heads, 5, 0.3, case.selector, case.block, case.density,
            )  # fmt: skip


def test_names_tell_kernels_apart() -> None:
    assert len({case.kernel(NEON).name for case in CASES.values()}) == len(CASES)


@pytest.mark.parametrize("block", [(32, 1), (64, 4)])
def test_attention_over_selected_blocks(
    width: Any,
    build: Callable[..., Any],
    lanes: Callable[[torch.Tensor], torch.Tensor],
    block: tuple[int, int],
) -> None:
    vectors = {"avx512": 2, "avx2": 1, "neon": 4}[width.isa.name]
    scores = Scores(0.3, 0, 2.5)
    kernel = PagedPrefill(width.isa, 6, 2, 24, 6 * 24 + 8, 5, scores, vectors, block)
    library = build([kernel], width.target)
    for length, lengths, counts in ROUNDS:
        given = CASES["pooled"].operands(length, lengths, counts)
        rows, columns = -(-length // block[0]), -(-max(lengths) // (block[1] * PAGE))
        seen = torch.rand(len(lengths), 6, rows, columns) < 0.5
        starts = torch.arange(columns) * (block[1] * PAGE)
        seen &= (starts < given.lengths[:, None])[:, None, None]
        order = torch.where(seen, torch.arange(columns), columns).sort().values
        lists = torch.where(order == columns, -1, order).int()
        inputs = [
            lanes(given.query), given.keys, given.values, given.pages, given.lengths,
            given.counts, lists, LAYER, length,
        ]  # fmt: skip
        tokens = len(lengths) * length
        y = library(kernel, inputs, (-(-tokens // LANES), 6 * 24, LANES), (1, 2))
        found = from_lanes.reference(y, (tokens,)).view(len(lengths), length, -1)
        expected = paged_attention.reference(
            given.query.double(), given.keys.double(), given.values.double(), given.pages,
            given.lengths, given.counts, LAYER, 6, 5, 0.3, 0, 2.5, (), lists, block,
        )  # fmt: skip
        assert bool(((found - expected).abs() <= 4e-6 * (1 + expected.abs())).all())
    lists[0, 0, 0, 0] = columns
    with pytest.raises(IndexError, match="begins after the sequence"):
        library(kernel, inputs, (-(-tokens // LANES), 6 * 24, LANES))


@pytest.mark.parametrize("skip", [2.0, 6.0, 12.0])
def test_blocks_below_the_maximum_are_skipped_within_the_bound(
    width: Any,
    build: Callable[..., Any],
    lanes: Callable[[torch.Tensor], torch.Tensor],
    skip: float,
) -> None:
    """Keys lie along one direction, those of a block at a level of its own, in any order."""
    vectors = {"avx512": 2, "avx2": 1, "neon": 4}[width.isa.name]
    length, total, block = 64, 640, (64, 4)
    kernel = PagedPrefill(
        width.isa, 2, 1, 24, 2 * 24 + 8, 5, Scores(0.3, 0, 0.0), vectors, block, skip
    )
    library = build([kernel], width.target)
    given = Blocks("pooled", 2, 1, 24).operands(length, [total], [length])
    direction = torch.nn.functional.normalize(torch.randn(24), dim=0)
    levels = torch.randperm(total // 64).repeat_interleave(64 // PAGE) * 2.0
    pages = given.pages[0].long()[: total // PAGE]
    given.keys[LAYER, pages] += (levels[:, None] * direction)[:, None, :, None]
    given.query[..., 5:53] = (
        given.query[..., 5:53].unflatten(-1, (2, 24)) / 8 + 5 * direction
    ).flatten(-2)
    lists = torch.arange(total // 64, dtype=torch.int32).expand(1, 1, 1, -1).contiguous()
    inputs = [
        lanes(given.query), given.keys, given.values, given.pages, given.lengths, given.counts,
        lists, LAYER, length,
    ]  # fmt: skip
    y = library(kernel, inputs, (length // LANES, 2 * 24, LANES), (1, 2))
    found = from_lanes.reference(y, (length,)).view(length, 2, 24).transpose(0, 1)
    query = given.query[0, :, 5:53].double().unflatten(-1, (2, 24)).transpose(0, 1)
    keys = given.keys[LAYER, pages, 0].double().transpose(0, 1).flatten(1)
    values = given.values[LAYER, pages, 0].double().flatten(0, 1)
    scores = (query @ keys * 0.3).masked_fill(
        torch.arange(total) > torch.arange(total - length, total)[:, None], float("-inf")
    )
    low = below_maximum(scores, skip, block[1] * PAGE, vectors * width.isa.vector)
    if skip == 2.0:
        assert 0.2 < float(low.double().mean()) < 1
    expected = scores.masked_fill(low, float("-inf")).softmax(-1) @ values
    # fp32 scores of magnitude s carry errors of s * 2**-23, which the weights show.
    bound = 4e-6 + float(scores.max()) * 2**-22
    assert bool(((found - expected).abs() <= bound * (1 + expected.abs())).all())
    change = float((expected - scores.softmax(-1) @ values).abs().max())
    assert change <= 2 * total * math.exp(-skip) * float(values.abs().max())
