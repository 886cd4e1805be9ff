"""Prompts of any padding become rows with the real tokens first."""

import pytest
import torch

from sparsify.generation.prompts import Prompts

RIGHT = torch.tensor([[1, 2, 3], [4, 0, 0]])
LEFT = torch.tensor([[1, 2, 3], [0, 0, 4]])


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        (RIGHT, torch.tensor([[1, 1, 1], [1, 0, 0]])),
        (LEFT, torch.tensor([[1, 1, 1], [0, 0, 1]])),
        ([[1, 2, 3], [4]], None),
        ([torch.tensor([1, 2, 3]), torch.tensor([4], dtype=torch.int32)], None),
    ],
)
def test_padding_goes_behind(ids, mask) -> None:
    prompts = Prompts.of(ids, mask)
    assert prompts.ids.dtype == torch.int64
    assert prompts.counts.tolist() == [3, 1]
    assert prompts.ids[0].tolist() == [1, 2, 3] and int(prompts.ids[1, 0]) == 4


def test_without_a_mask_all_tokens_are_real() -> None:
    prompts = Prompts.of(RIGHT)
    assert torch.equal(prompts.ids, RIGHT) and prompts.counts.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("ids", "mask", "error", "message"),
    [
        (torch.tensor([1, 2]), None, ValueError, r"shape \(2,\).*\[batch, length\]"),
        ([], None, ValueError, "there is no prompt"),
        ([[1], []], None, ValueError, r"prompt 1 has shape \(0,\)"),
        (torch.zeros(1, 3), None, TypeError, "prompt 0 is torch.float32"),
        (RIGHT, torch.ones(2, 2), ValueError, r"attention_mask has shape \(2, 2\)"),
        (RIGHT, torch.tensor([[1, 0, 1], [1, 1, 1]]), ValueError, "between others"),
        (RIGHT, torch.tensor([[0, 0, 0], [1, 1, 1]]), ValueError, "at least one token id"),
        ([[1]], torch.ones(1, 1), ValueError, "rows have their lengths"),
    ],
)
def test_wrong_prompts_are_refused(ids, mask, error, message) -> None:
    with pytest.raises(error, match=message):
        Prompts.of(ids, mask)
