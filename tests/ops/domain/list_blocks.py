"""Lists of marked blocks: rows of no, some and all."""

from collections.abc import Iterator

import torch

from sparsify.ops.onnx.list_blocks import LIST_BLOCKS
from tests.ops.domain.case import Case, call


def cases() -> Iterator[Case]:
    for shape in ((1, 1, 1, 1), (2, 3, 5, 9)):
        marks = torch.rand(shape) < torch.rand(*shape[:3], 1)
        marks[..., 0, :], marks[..., -1, :] = False, True
        yield Case(LIST_BLOCKS, {"marks": marks}, {}, (call("list_blocks", marks),))
