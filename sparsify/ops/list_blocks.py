"""Lists of the blocks that a map marks: how a pattern of run-time size becomes a `BlockMask`."""

from __future__ import annotations

import torch

from sparsify.ops.library import declare


def _fake(marks: torch.Tensor) -> torch.Tensor:
    torch._check(
        marks.dtype == torch.bool and marks.dim() == 4,
        lambda: (
            f"list_blocks: marks are {marks.dtype} of {marks.dim()} dimensions; give bool "
            "[batch, heads, query_blocks, key_blocks]"
        ),
    )
    return marks.new_empty(marks.shape, dtype=torch.int32)


@declare("list_blocks(Tensor marks) -> Tensor", _fake)
def list_blocks(marks: torch.Tensor) -> torch.Tensor:
    """The marked blocks of each row, ascending, and zeros after them.

    Args:
        marks: bool ``[batch, heads, query_blocks, key_blocks]``.

    Returns:
        int32 of the same shape, the ``indices`` of `block_attention`; how many of a row count is
        the number of its marks.
    """
    order = torch.sort(marks, dim=-1, descending=True, stable=True).indices
    listed = torch.arange(marks.shape[-1]) < marks.sum(-1, keepdim=True)
    return torch.where(listed, order, 0).to(torch.int32)
