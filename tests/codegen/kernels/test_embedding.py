"""Rows of a table by index, and the refusal of indices outside it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsify.codegen.isa import NEON, Isa
from sparsify.codegen.kernels.cpu.embedding import Embedding

TABLES = [(1, 1), (5, 7), (3, 16), (100, 33)]
DTYPES = [torch.int64, torch.int32]


def embedding(isa: Isa, shape: tuple[int, int], dtype: torch.dtype) -> Embedding:
    return Embedding(isa, *shape, str(dtype).removeprefix("torch."))


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    kernels = [embedding(width.isa, shape, dtype) for shape in TABLES for dtype in DTYPES]
    kernels.append(Embedding(width.isa, None, 7, "int64"))
    return build(kernels, width.target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", TABLES)
def test_rows_are_taken(
    library: Any, width: Any, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    table = torch.randn(shape)
    for count in (0, 1, 7, 40):
        ids = torch.randint(shape[0], (count,), dtype=dtype)
        kernel = embedding(width.isa, shape, dtype)
        found = library(kernel, [table, ids], (count, shape[1]), threads=(1, 2, 3))
        assert torch.equal(found, table[ids.long()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [-1, 5, 2**31 - 1])
def test_an_index_outside_the_table_is_refused(
    library: Any, width: Any, dtype: torch.dtype, wrong: int
) -> None:
    ids = torch.zeros(9, dtype=dtype)
    ids[torch.randint(9, ())] = wrong
    with pytest.raises(IndexError, match="an index is outside the table of 5 rows"):
        library(embedding(width.isa, (5, 7), dtype), [torch.randn(5, 7), ids], (9, 7))


def test_a_table_may_have_any_number_of_rows(library: Any, width: Any) -> None:
    kernel = Embedding(width.isa, None, 7, "int64")
    for rows in (1, 5, 12):
        table, ids = torch.randn(rows, 7), torch.randint(rows, (9,))
        assert torch.equal(library(kernel, [table, ids], (9, 7)), table[ids])
        for wrong in (-1, rows):
            with pytest.raises(IndexError, match="an index is outside the table"):
                library(kernel, [table, torch.tensor([0, wrong])], (2, 7))


def test_neon_copies_vectors(assembly_for_neon: Callable[..., str]) -> None:
    assembly = assembly_for_neon([embedding(NEON, (100, 33), torch.int64)])
    assert "ldr\tq" in assembly or "ldp\tq" in assembly
