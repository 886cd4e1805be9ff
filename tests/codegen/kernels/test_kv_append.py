"""Appending to the paged cache: every page, slot and refusal."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import NEON, Isa
from sparsify.codegen.kernels.cpu.kv_append import KvAppend
from sparsify.layouts import Form
from sparsify.ops import PAGE, kv_append

FORMS: tuple[Form, ...] = ("rows", "lanes")
LAYERS, POOL = 2, 48


@dataclass(frozen=True)
class Case:
    """One tensor for keys and values with three features around them, or two without any."""

    kv_heads: int
    head_dim: int
    split: bool = False

    @property
    def features(self) -> tuple[int, int]:
        size = self.kv_heads * self.head_dim
        return (size, size) if self.split else (2 * size + 6,) * 2

    @property
    def offsets(self) -> tuple[int, int]:
        return (0, 0) if self.split else (3, 3 + self.kv_heads * self.head_dim)

    def kernel(self, isa: Isa, form: Form) -> KvAppend:
        return KvAppend(isa, self.kv_heads, self.head_dim, self.features, self.offsets, form)


CASES = {
    "one": Case(1, 1),
    "odd": Case(2, 7, split=True),
    "24": Case(3, 24),
    "64": Case(3, 64),
    "256": Case(1, 256, split=True),
}

# (length, starts, counts)
ROUNDS = [
    (1, [0], [1]),
    (1, [15, 16, 40], [1, 1, 0]),
    (8, [3], [8]),
    (9, [0, 30], [9, 2]),
    (16, [0, 16], [16, 16]),
    (33, [0], [33]),
    (48, [0, 5], [48, 40]),
    (150, [16], [150]),
]


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    kernels = [case.kernel(width.isa, form) for case in CASES.values() for form in FORMS]
    return build(kernels, width.target)


@dataclass
class State:
    """A cache of random contents and a scrambled page table."""

    keys: torch.Tensor
    values: torch.Tensor
    pages: torch.Tensor

    @classmethod
    def random(cls, case: Case, batch: int) -> "State":
        leading = (LAYERS, POOL, case.kv_heads)
        return cls(
            torch.randn(*leading, case.head_dim, PAGE),
            torch.randn(*leading, PAGE, case.head_dim),
            torch.randperm(POOL, dtype=torch.int32)[: batch * (POOL // batch)].view(batch, -1),
        )


@pytest.fixture
def append(library: Any, width: Any, lanes: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """Runs a case's kernel; the state is changed."""

    def run(
        case: Case,
        form: Form,
        state: State,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: list[int],
        counts: list[int],
        layer: int = 1,
    ) -> torch.Tensor:
        given = [lanes(x) if form == "lanes" else x.flatten(0, 1) for x in (key, value)]
        numbers = [torch.tensor(starts), torch.tensor(counts)]
        return library(
            case.kernel(width.isa, form),
            [state.keys, state.values, *given, state.pages, *numbers, layer, key.shape[1]],
            (len(starts),),
            threads=(1, 2, 3),
            dtype=torch.int64,
            changes=(state.keys, state.values),
        )

    return run


def projected(case: Case, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    key = torch.randn(batch, length, case.features[0])
    return key, torch.randn(batch, length, case.features[1]) if case.split else key


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_every_page_and_slot(append: Callable[..., Any], name: str, form: Form) -> None:
    case = CASES[name]
    for length, starts, counts in ROUNDS:
        state = State.random(case, len(starts))
        key, value = projected(case, len(starts), length)
        keys, values = state.keys.clone(), state.values.clone()
        expected = kv_append.reference(
            keys, values, key, value, state.pages,
            torch.tensor(starts), torch.tensor(counts), 1, case.offsets,
        )  # fmt: skip
        found = append(case, form, state, key, value, starts, counts)
        assert torch.equal(found, expected), (length, starts, counts)
        assert torch.equal(state.keys, keys), (length, starts, counts)
        assert torch.equal(state.values, values), (length, starts, counts)


# What is wrong, and the error that says so.
WRONG = {
    "page beyond the pool": (IndexError, "no page of the cache"),
    "negative page": (IndexError, "no page of the cache"),
    "page table too short": (IndexError, "longer than its row of the page table"),
    "negative start": (ValueError, "counts must lie between"),
    "negative count": (ValueError, "counts must lie between"),
    "count beyond the row": (ValueError, "counts must lie between"),
    "layer": (IndexError, "no such layer"),
    "start that would overflow": (IndexError, "longer than its row of the page table"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrong", WRONG)
def test_refused_before_anything_is_written(
    append: Callable[..., Any], wrong: str, form: Form
) -> None:
    case, starts, counts, layer = CASES["odd"], [0, 20], [20, 18], 1
    state = State.random(case, 2)
    before = state.keys.clone(), state.values.clone()
    match wrong:
        case "page beyond the pool":
            state.pages[1, 2] = POOL
        case "negative page":
            state.pages[1, 1] = -1
        case "page table too short":
            state.pages = state.pages[:, :2].contiguous()
        case "negative start":
            starts = [0, -1]
        case "negative count":
            counts = [20, -1]
        case "count beyond the row":
            counts = [20, 21]
        case "layer":
            layer = LAYERS
        case "start that would overflow":
            starts = [0, 2**63 - 2]
    error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        append(CASES["odd"], form, state, *projected(CASES["odd"], 2, 20), starts, counts, layer)
    assert torch.equal(state.keys, before[0]) and torch.equal(state.values, before[1])


@pytest.mark.parametrize("form", FORMS)
def test_pages_that_are_not_touched_may_be_anything(append: Callable[..., Any], form: Form) -> None:
    case = CASES["odd"]
    state = State.random(case, 1)
    state.pages[0, 0] = state.pages[0, 3:] = -7
    append(case, form, state, *projected(case, 1, 20), [20], [20])


def test_names_tell_kernels_apart() -> None:
    kernels = [case.kernel(NEON, form) for case in CASES.values() for form in FORMS]
    assert len({kernel.name for kernel in kernels}) == len(kernels)


def test_neon_copies_vectors(assembly_for_neon: Callable[..., str]) -> None:
    assembly = assembly_for_neon([CASES["64"].kernel(NEON, form) for form in FORMS])
    assert "ldr\tq" in assembly or "ldp\tq" in assembly
