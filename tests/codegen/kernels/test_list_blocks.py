"""Marked blocks as lists, against the reference."""

from collections.abc import Callable
from typing import Any

import torch

from sparsify.codegen.kernels.cpu.list_blocks import ListBlocks
from sparsify.ops import list_blocks


def test_lists_are_those_of_the_reference(width: Any, build: Callable[..., Any]) -> None:
    library = build([ListBlocks()], width.target)
    for rows, columns in ((1, 1), (7, 9), (33, 31), (600, 130)):
        marks = torch.rand(rows, columns) < torch.rand(rows, 1)
        marks[0], marks[-1] = True, False
        found = library(ListBlocks(), [marks], (rows, columns), dtype=torch.int32)
        expected = list_blocks.reference(marks[None, None])[0, 0]
        assert torch.equal(found, expected)
