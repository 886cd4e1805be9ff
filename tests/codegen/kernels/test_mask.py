"""Attention masks brought into the form the attention kernel adds."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from sparsify.codegen.kernels.cpu.attention_mask import QUERY_PADDING, AttentionMask, MaskShape

SHAPES = [MaskShape(*flags) for flags in product((False, True), repeat=3)]
LOG2E = 1 / math.log(2)


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    return build([AttentionMask(s, d) for s in SHAPES for d in ("bool", "float32")], width.target)


def prepared(library: Any, shape: MaskShape, mask: torch.Tensor, queries: int) -> torch.Tensor:
    batch, heads, _, keys = mask.shape
    padded = -(-queries // QUERY_PADDING) * QUERY_PADDING if shape.queries else 1
    dtype = str(mask.dtype).removeprefix("torch.")
    result = library(AttentionMask(shape, dtype), [mask], (batch, heads, keys, padded), (1, 2, 3))
    return result[..., : mask.shape[2]].transpose(2, 3)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_shape(library: Any, shape: MaskShape) -> None:
    for queries, keys in ((1, 1), (7, 9), (64, 17), (65, 130)):
        extents = (
            3 if shape.batch else 1,
            2 if shape.heads else 1,
            queries if shape.queries else 1,
        )
        seen = torch.rand(*extents, keys) < 0.5
        found = prepared(library, shape, seen, queries)
        assert torch.equal(found == 0, seen)
        assert torch.equal(found == -math.inf, ~seen)
        added = 10 * torch.randn(*extents, keys)
        found = prepared(library, shape, added, queries)
        torch.testing.assert_close(found, added * LOG2E, rtol=1e-6, atol=0)


def test_minus_infinity_hides_and_finite_numbers_stay_finite(library: Any) -> None:
    """Sums of two lowest numbers must not become minus infinity; NaN stays NaN."""
    lowest = torch.finfo(torch.float32).min
    mask = torch.tensor([lowest, -math.inf, -1e4, 0.0, math.nan]).view(1, 1, 1, 5)
    found = prepared(library, SHAPES[0], mask, 1).flatten().tolist()
    assert -1e31 < found[0] < -1e29
    assert found[1] == -math.inf
    assert found[2] == pytest.approx(-1e4 * LOG2E)
    assert found[3] == 0
    assert math.isnan(found[4])
