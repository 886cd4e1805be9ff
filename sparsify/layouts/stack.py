"""Matrices of one shape, packed as one: the weights of a layer's experts.

    W[0]   rows x columns  \\
    zeros                   |  whole units of the layout
    W[1]   rows x columns  /
    zeros
    ...

Below each other, each padded to whole units of the layout, so that what a kernel does for a run of
rows it does for one of the matrices, and passes, files and kernels of linears serve experts too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsify.layouts.base import Layout


@dataclass(frozen=True)
class Stack:
    """``count`` matrices ``[rows, columns]`` in one layout."""

    layout: Layout
    count: int
    rows: int
    columns: int

    @property
    def pitch(self) -> int:
        """Rows from one matrix to the next."""
        return -(-self.rows // self.layout.unit) * self.layout.unit

    @property
    def shape(self) -> tuple[int, int]:
        """Of the one matrix that is packed."""
        return self.count * self.pitch, self.columns

    def pack(self, matrices: torch.Tensor) -> dict[str, torch.Tensor]:
        """Packs ``[count, rows, columns]``, or what views as that."""
        matrices = matrices.detach().reshape(self.count, self.rows, self.columns)
        padded = F.pad(matrices, (0, 0, 0, self.pitch - self.rows))
        return self.layout.pack(padded.flatten(0, 1))

    def unpack(self, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[count, rows, columns]``."""
        whole = self.layout.unpack(dict(packed), self.shape)
        return whole.reshape(self.count, self.pitch, self.columns)[:, : self.rows]

    def named(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Packed tensors by the names that the layout has for them."""
        return dict(zip(self.layout.tensors, tensors, strict=True))
