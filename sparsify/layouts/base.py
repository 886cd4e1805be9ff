"""What a storage layout is, and the registry that finds one by its spec.

A layout is a frozen dataclass whose fields are its parameters. Its spec is text that names both,
``sell{rows=8,k_block=384,window=256}``: operators, reports and saved files carry the spec.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from sparsify.layouts.stats import WeightStats
from sparsify.specs import Registry, spec_of

LANES = 16
"""Tokens side by side in one lane group: the innermost extent of every activation in lanes."""

FEW_TOKENS = 8
"""Up to this many tokens, activations stay row-major: a lane group would be mostly empty."""

Form = Literal["lanes", "rows"]
"""How a kernel sees activations: ``[groups, features, 16]`` or ``[tokens, features]``."""


def form_of(tokens: int) -> Form:
    """The form in which activations of so many tokens are computed."""
    return "rows" if tokens <= FEW_TOKENS else "lanes"


@dataclass(frozen=True)
class Layout(ABC):
    """How the weight ``W[out_features, in_features]`` of a linear is stored.

    One packing serves every token count. ``unpack(pack(w), w.shape)`` equals ``w`` exactly.
    """

    name: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]]
    """Names of the packed tensors, in the order in which operators carry them."""
    is_dense: ClassVar[bool] = False
    """Whether zeros are stored like all other values."""

    @abstractmethod
    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Packs a dense fp32 matrix; the keys are ``tensors``."""

    @abstractmethod
    def unpack(self, packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        """The dense matrix that was packed."""

    @abstractmethod
    def validate(self, packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> None:
        """Raises ValueError, naming the tensor and the cause, unless ``packed`` is well formed.

        Whatever passes may be handed to a kernel that does no bounds checks.
        """

    def check_tensors(self, packed: dict[str, torch.Tensor], **dtypes: torch.dtype) -> None:
        """The part of `validate` that all layouts share: names, dtypes, contiguous memory."""
        missing = [name for name in self.tensors if name not in packed]
        if missing:
            raise ValueError(f"{self.spec}: tensor {missing[0]!r} is missing from {list(packed)}")
        for name, dtype in dtypes.items():
            found = packed[name]
            if found.dtype != dtype:
                raise ValueError(f"{self.spec}: tensor {name!r} is {found.dtype}, not {dtype}")
            if not found.is_contiguous():
                raise ValueError(f"{self.spec}: tensor {name!r} is not contiguous in memory")

    @abstractmethod
    def estimate_nbytes(self, shape: tuple[int, int], nnz: int) -> int:
        """Bytes a packing of this shape and nonzero count takes, to a few percent."""

    def nbytes(self, packed: dict[str, torch.Tensor]) -> int:
        """Bytes of a packing."""
        return sum(t.nbytes for t in packed.values())

    def fits(self, stats: WeightStats) -> str | None:
        """None when the weight can be stored so, else the reason why it cannot."""
        return None

    @property
    def unit(self) -> int:
        """Rows that cannot be parted: a stack of matrices gives each whole units."""
        return 1

    @property
    def spec(self) -> str:
        return spec_of(self)

    def __str__(self) -> str:
        return self.spec


def require_matrix(weight: torch.Tensor) -> torch.Tensor:
    """The weight, detached.

    Raises:
        ValueError: it is no float32 matrix on the CPU; packing would lose or misplace values.
    """
    if weight.dim() != 2 or weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(
            f"cannot pack a weight of shape {tuple(weight.shape)}, {weight.dtype} on "
            f"{weight.device}: layouts store float32 matrices on the CPU; convert it first"
        )
    return weight.detach()


LAYOUTS: Registry[Layout] = Registry("layout")
"""Every layout by its name."""

register = LAYOUTS.register
layout_names = LAYOUTS.names
parse = LAYOUTS.parse
