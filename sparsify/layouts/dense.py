"""Dense layouts: the canonical matrix, and the panels the dense kernel reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.layouts.base import Layout, register, require_matrix


@register
@dataclass(frozen=True)
class Dense(Layout):
    """The canonical dense matrix, one tensor ``[out_features, in_features]``."""

    name = "dense"
    tensors = ("weight",)
    is_dense = True

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": require_matrix(weight).contiguous()}

    def unpack(self, packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        return packed["weight"]

    def validate(self, packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> None:
        self.check_tensors(packed, weight=torch.float32)
        found = tuple(packed["weight"].shape)
        if found != shape:
            raise ValueError(f"dense: tensor 'weight' has shape {found}, expected {shape}")

    def estimate_nbytes(self, shape: tuple[int, int], nnz: int) -> int:
        return 4 * shape[0] * shape[1]


@register
@dataclass(frozen=True)
class PackedDense(Layout):
    """Panels of ``rows`` output features: ``[ceil(out/rows), in_features, rows]``.

    The kernel walks a panel along in_features and broadcasts its ``rows`` neighbours; the last
    panel is padded with zeros.
    """

    rows: int = 6

    name = "packed_dense"
    tensors = ("panels",)
    is_dense = True

    def __post_init__(self) -> None:
        if self.rows <= 0:
            raise ValueError(f"packed_dense: rows={self.rows} must be positive")

    @property
    def unit(self) -> int:
        return self.rows

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = require_matrix(weight)
        out_features = weight.shape[0]
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -out_features % self.rows))
        return {"panels": padded.unflatten(0, (-1, self.rows)).transpose(1, 2).contiguous()}

    def unpack(self, packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        return packed["panels"].transpose(1, 2).flatten(0, 1)[: shape[0]].contiguous()

    def validate(self, packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> None:
        self.check_tensors(packed, panels=torch.float32)
        expected = (-(-shape[0] // self.rows), shape[1], self.rows)
        found = tuple(packed["panels"].shape)
        if found != expected:
            raise ValueError(f"{self.spec}: tensor 'panels' has shape {found}, expected {expected}")

    def estimate_nbytes(self, shape: tuple[int, int], nnz: int) -> int:
        return 4 * -(-shape[0] // self.rows) * self.rows * shape[1]
