"""Attention against float64: heads, lengths, causality, every mask, tiles that begin mid-group."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sparsify.band import Band
from sparsify.block_mask import PARTIAL, BlockMask
from sparsify.codegen.isa import NEON, Isa
from sparsify.codegen.kernels.cpu.attention import Attention
from sparsify.codegen.kernels.cpu.attention_mask import QUERY_PADDING, AttentionMask, MaskShape
from sparsify.codegen.kernels.cpu.scores import Scores
from sparsify.ops import block_attention, from_lanes, fused_attention

# (batch, queries, keys)
SIZES = [
    *((1, n, n) for n in (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130)),
    *((2, 7, 7), (3, 16, 16), (2, 33, 33), (3, 65, 65), (5, 1, 1)),
    *((1, 1, 40), (3, 5, 70), (2, 40, 3), (2, 17, 128)),
]


@dataclass(frozen=True)
class Case:
    """A kernel; ``split``: query, key and value are tensors of their own; ``tile`` widens tiles."""

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = False
    mask: MaskShape | None = None
    split: bool = False
    window: int = 0
    sinks: int = 0
    softcap: float = 0.0
    block: tuple[int, int] | None = None
    skip: float = 0.0
    tile: int = 1

    @property
    def features(self) -> tuple[int, int, int]:
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        # Five features before and three after, as if more were projected together.
        return (query, key, key) if self.split else (8 + query + 2 * key,) * 3

    @property
    def offsets(self) -> tuple[int, int, int]:
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (0, 0, 0) if self.split else (5, 5 + query, 5 + query + key)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def kernel(self, isa: Isa) -> Attention:
        return Attention(
            isa,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.features,
            self.offsets,
            Scores(self.scale, self.window, self.softcap),
            self.causal,
            self.sinks,
            self.mask,
            {"avx512": 2, "avx2": 1, "neon": 4}[isa.name] * self.tile,
            self.block,
            self.skip,
        )


KEYS = MaskShape(batch=True, heads=False, queries=False)
FULL = MaskShape(batch=True, heads=True, queries=True)
BIAS = MaskShape(batch=False, heads=True, queries=True)

CASES = {
    "one": Case(1, 1, 1),
    "small": Case(3, 3, 7, split=True),
    "causal": Case(4, 2, 32, causal=True),
    "key mask": Case(2, 2, 16, mask=KEYS),
    "causal key mask": Case(3, 1, 9, causal=True, mask=KEYS, split=True),
    "full mask": Case(2, 2, 8, mask=FULL),
    "position bias": Case(2, 2, 33, mask=BIAS),
    "window": Case(2, 1, 16, causal=True, window=20),
    "window of both sides": Case(2, 2, 8, split=True, window=9, sinks=3),
    "window and sinks": Case(2, 2, 24, causal=True, window=17, sinks=5, softcap=1.5),
    "soft cap": Case(2, 2, 8, softcap=0.7, split=True, tile=2),
    "masked window": Case(2, 2, 8, causal=True, window=30, sinks=40, mask=KEYS),
    "blocks": Case(4, 2, 16, block=(32, 16)),
    "causal blocks": Case(
        2, 2, 9, causal=True, block=(64, 48), tile=2, window=50, sinks=2, softcap=2.0
    ),
    "masked blocks": Case(2, 2, 8, block=(32, 96), mask=BIAS, split=True),
    "skipping blocks": Case(2, 2, 8, block=(32, 16), skip=3.0),
}
LISTED = [name for name, case in CASES.items() if case.block]
UNMASKED = [name for name, case in CASES.items() if case.mask is None and not case.block]
MASKED = [name for name, case in CASES.items() if case.mask is not None and not case.block]


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    kernels: list[Any] = [case.kernel(width.isa) for case in CASES.values()]
    shapes = {case.mask for case in CASES.values() if case.mask}
    kernels += [AttentionMask(s, dtype) for s in shapes for dtype in ("bool", "float32")]
    return build(kernels, width.target)


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def operands(case: Case, size: tuple[int, int, int]) -> Operands:
    batch, queries, keys = size
    if not case.split and queries == keys:
        together = torch.randn(batch, queries, case.features[0])
        return together, together, together
    lengths = (queries, keys, keys)
    q, k, v = (torch.randn(batch, n, f) for n, f in zip(lengths, case.features, strict=True))
    return q, k, v


def reference(case: Case, tensors: Operands, mask: torch.Tensor | None) -> torch.Tensor:
    q, k, v = (x.double() for x in tensors)
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    return fused_attention.reference(
        q,
        k,
        v,
        mask,
        case.heads,
        case.kv_heads,
        case.head_dim,
        case.offsets,
        case.scale,
        case.causal,
        [],
        case.window,
        case.sinks,
        case.softcap,
    )


@pytest.fixture
def attend(
    library: Any, width: Any, lanes: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Runs a case's kernel, after its mask's."""

    def run(
        case: Case,
        tensors: Operands,
        mask: torch.Tensor | None = None,
        blocks: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        batch, queries = tensors[0].shape[:2]
        keys = tensors[1].shape[1]
        added = None
        if case.mask is not None and mask is not None:
            padded = -(-queries // QUERY_PADDING) * QUERY_PADDING if case.mask.queries else 1
            prepare = AttentionMask(case.mask, str(mask.dtype).removeprefix("torch."))
            added = library(prepare, [mask], (*mask.shape[:2], keys, padded))
        inputs = [*map(lanes, tensors), added, *blocks, batch, queries, keys]
        shape = (-(-batch * queries // 16), case.heads * case.head_dim, 16)
        y = library(case.kernel(width.isa), inputs, shape, threads=(1, 2, 3))
        return from_lanes.reference(y, (batch, queries))

    return run


def mask_of(case: Case, size: tuple[int, int, int]) -> torch.Tensor:
    """Random, every query seeing at least its first key, as bool."""
    assert case.mask is not None
    batch, queries, keys = size
    extents = (
        batch if case.mask.batch else 1,
        case.heads if case.mask.heads else 1,
        queries if case.mask.queries else 1,
    )
    mask = torch.rand(*extents, keys) < 0.6
    mask[..., 0] = True
    return mask


def assert_close(found: torch.Tensor, expected: torch.Tensor, about: object) -> None:
    error = (found - expected).abs()
    assert bool((error <= 4e-6 * (1 + expected.abs())).all()), (about, float(error.max()))


@pytest.mark.parametrize("name", UNMASKED)
def test_without_mask(attend: Callable[..., torch.Tensor], name: str) -> None:
    case = CASES[name]
    for size in SIZES:
        tensors = operands(case, size)
        assert_close(attend(case, tensors), reference(case, tensors, None), size)


@pytest.mark.parametrize("name", MASKED)
def test_bool_mask(attend: Callable[..., torch.Tensor], name: str) -> None:
    case = CASES[name]
    for size in SIZES:
        tensors, mask = operands(case, size), mask_of(case, size)
        assert_close(attend(case, tensors, mask), reference(case, tensors, mask), size)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min, -1e4])
def test_float_mask(attend: Callable[..., torch.Tensor], name: str, hidden: float) -> None:
    """Numbers to add, among them what models put where a key is hidden."""
    case = CASES[name]
    for size in SIZES[::2]:
        tensors, seen = operands(case, size), mask_of(case, size)
        mask = torch.where(seen, torch.randn(seen.shape), hidden)
        assert_close(attend(case, tensors, mask), reference(case, tensors, mask), size)


@pytest.mark.parametrize("name", ["key mask", "causal key mask", "full mask"])
@pytest.mark.parametrize("hidden", [False, -math.inf, torch.finfo(torch.float32).min])
def test_queries_that_see_no_key(
    attend: Callable[..., torch.Tensor], name: str, hidden: float
) -> None:
    """As in PyTorch: nothing, or where the mask is finite, all keys alike."""
    case = CASES[name]
    for size in ((2, 7, 7), (3, 33, 33), (2, 65, 65)):
        tensors, seen = operands(case, size), mask_of(case, size)
        seen[0] = False
        seen[1, ..., :5] = False
        mask = seen if hidden is False else torch.where(seen, 0.0, hidden)
        assert_close(attend(case, tensors, mask), reference(case, tensors, mask), size)


def random_blocks(case: Case, size: tuple[int, int, int], lists: tuple[int, int]) -> BlockMask:
    """Hidden, partial and full blocks; the first queries see nothing."""
    assert case.block is not None
    _, queries, keys = size
    rows, columns = -(-queries // case.block[0]), -(-keys // case.block[1])
    kinds = torch.randint(0, 3, (*lists, rows, columns), dtype=torch.int8)
    kinds[0, 0, 0] = 0
    return BlockMask.of_kinds(kinds, (queries, keys), case.block)


def block_reference(
    case: Case, tensors: Operands, blocks: BlockMask, mask: torch.Tensor | None
) -> torch.Tensor:
    q, k, v = (x.double() for x in tensors)
    return block_attention.reference(
        q,
        k,
        v,
        blocks.tensors,
        None if mask is None else mask.double(),
        case.heads,
        case.kv_heads,
        case.head_dim,
        case.offsets,
        case.scale,
        case.block,
        case.causal,
        case.window,
        case.sinks,
        case.softcap,
    )


@pytest.mark.parametrize("name", [name for name in LISTED if name != "skipping blocks"])
def test_listed_blocks(attend: Callable[..., torch.Tensor], name: str) -> None:
    """One list for all heads, for all of a key head, and for each head."""
    case = CASES[name]
    for number, size in enumerate([*SIZES, (1, 200, 260), (2, 130, 100)]):
        lists = [(1, 1), (size[0], case.kv_heads), (size[0], case.heads)][number % 3]
        tensors, blocks = operands(case, size), random_blocks(case, size, lists)
        mask = torch.randn(1, case.heads, *size[1:]) if case.mask else None
        found = attend(case, tensors, mask, blocks.tensors)
        assert_close(found, block_reference(case, tensors, blocks, mask), size)


def test_skipping_leaves_out_only_blocks_of_little_weight(
    attend: Callable[..., torch.Tensor],
) -> None:
    """The first block has the largest scores, then one that nearly equals it, then small ones."""
    case = CASES["skipping blocks"]
    q, k, v = (torch.rand(1, n, case.features[0]) / 4 + 0.5 for n in (64, 48, 48))
    at = case.offsets[1]
    for first, level in ((0, 4.0), (16, 3.9), (32, 0.1)):
        k[:, first : first + 16, at : at + 16] = level
    full = BlockMask.of_band(Band(), (64, 48), (32, 16))
    found = attend(case, (q, k, v), None, full.tensors)
    hidden = BlockMask.of_kinds(torch.tensor([2, 2, 0]).expand(1, 1, 2, 3), (64, 48), (32, 16))
    assert_close(found, block_reference(case, (q, k, v), hidden, None), "skipped")
    with pytest.raises(AssertionError):
        assert_close(found, block_reference(case, (q, k, v), full, None), "nothing skipped")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lists: lists[0].fill_(9), "longer than its row"),
        (lambda lists: lists[1].fill_(3), "does not exist"),
        (lambda lists: lists[3].fill_(-1), "does not exist"),
    ],
)
def test_wrong_lists_are_errors(
    attend: Callable[..., torch.Tensor], spoil: Callable[[Any], Any], message: str
) -> None:
    case = CASES["blocks"]
    tensors = operands(case, (1, 40, 40))
    kinds = torch.full((1, 1, 2, 3), PARTIAL)
    kinds[..., 2] = 2
    lists = BlockMask.of_kinds(kinds, (40, 40), (32, 16)).tensors
    spoil(lists)
    with pytest.raises(IndexError, match=message):
        attend(case, tensors, None, lists)
    with pytest.raises(ValueError, match="one list of blocks of keys for each block of queries"):
        attend(case, operands(case, (1, 70, 40)), None, lists)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_flat_and_sharp_scores(attend: Callable[..., torch.Tensor], scale: float) -> None:
    """At 30 the scores differ by thousands, and one key takes all the weight."""
    case = CASES["small"]
    for size in ((1, 33, 33), (2, 65, 130)):
        q, k, v = operands(case, size)
        tensors = (q * scale, k * scale, v)
        found, expected = attend(case, tensors), reference(case, tensors, None)
        # fp32 scores of magnitude s carry errors of s * 2**-23, which the weights show.
        assert float((found - expected).abs().max()) < 4e-6 + 1e-6 * scale**2


def test_later_keys_are_larger(attend: Callable[..., torch.Tensor]) -> None:
    """Every block of keys raises the running maximum, so earlier results are scaled down."""
    case = CASES["small"]
    q, k, v = operands(case, (1, 40, 200))
    k = k * torch.linspace(0, 6, 200)[None, :, None]
    assert_close(attend(case, (q, k, v)), reference(case, (q, k, v), None), "rising")


def test_sequences_do_not_see_each_other(attend: Callable[..., torch.Tensor]) -> None:
    case = CASES["causal"]
    (x, *_) = operands(case, (3, 21, 21))
    alone = [attend(case, (x[i : i + 1],) * 3) for i in range(3)]
    x = x.clone()
    x[1] = math.nan
    together = attend(case, (x, x, x))
    assert_close(together[0], alone[0][0].double(), "first")
    assert_close(together[2], alone[2][0].double(), "last")
    assert together[1].isnan().all()


def test_names_tell_kernels_apart() -> None:
    kernels = [case.kernel(NEON) for case in CASES.values()]
    assert len({kernel.name for kernel in kernels}) == len(kernels)


def test_neon_has_vector_multiply_adds(assembly_for_neon: Callable[..., str]) -> None:
    masks = [AttentionMask(KEYS, "bool"), AttentionMask(BIAS, "float32")]
    assert "fmla\tv" in assembly_for_neon([CASES["causal key mask"].kernel(NEON), *masks])
