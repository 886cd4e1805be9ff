"""Lists of marked blocks: rows of no, some and all."""

import torch

from tests.ops.eager.case import Case


def cases(lanes: bool) -> list[Case]:
    found = []
    for shape in [] if lanes else [(1, 1, 1, 1), (2, 3, 5, 9), (1, 2, 4, 33)]:
        marks = torch.rand(shape) < torch.rand(*shape[:3], 1)
        marks[..., 0, :], marks[..., -1, :] = False, True
        y = torch.zeros(shape, dtype=torch.int32)
        for row, own in zip(y.view(-1, shape[-1]), marks.view(-1, shape[-1]), strict=True):
            listed = [column for column, mark in enumerate(own.tolist()) if mark]
            row[: len(listed)] = torch.tensor(listed)
        found.append(Case("list_blocks", (marks,), y, label="x".join(map(str, shape))))
    return found
