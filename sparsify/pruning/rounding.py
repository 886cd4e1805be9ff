"""Rounding weights to a shorter type, so that layouts can store the shorter values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.table import Table
from torch import nn
from torch.export import ExportedProgram

from sparsify.pruning.sites import prunable_weights


@dataclass(frozen=True)
class LayerRounding:
    """What rounding did to one weight; ``names`` are all layers that share it.

    Attributes:
        error: the root of the mean square change over that of the weight.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    error: float


@dataclass(frozen=True)
class RoundingReport:
    """What was rounded, layer by layer in the model's order."""

    method: str
    layers: tuple[LayerRounding, ...]

    def __iter__(self) -> Iterator[LayerRounding]:
        return iter(self.layers)

    @property
    def error(self) -> float:
        """The largest relative error of a layer."""
        return max((layer.error for layer in self.layers), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        layers = [
            {**asdict(x), "names": list(x.names), "shape": list(x.shape)} for x in self.layers
        ]
        return {"method": self.method, "error": self.error, "layers": layers}

    def table(self) -> Table:
        table = Table(
            title=f"{self.method}: relative error up to {self.error:.1e} "
            f"in {len(self.layers)} weights"
        )
        for name in ("layer", "shape"):
            table.add_column(name)
        table.add_column("relative error", justify="right")
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            table.add_row("\n".join(layer.names), shape, f"{layer.error:.1e}")
        return table

    def __rich__(self) -> Table:
        return self.table()


@dataclass(frozen=True)
class RoundWeights:
    """Rounds weights to the nearest value of ``dtype``; they stay in their own type.

    A bitmap then stores two bytes a nonzero instead of four. Zeros stay zeros. Layers whose weight
    is tied are rounded once, embeddings never; apply it after pruning.

    Attributes:
        dtype: ``bfloat16``.
        skip: globs over qualified layer names that stay as they are; a name covers all inside it.
    """

    dtype: Literal["bfloat16"] = "bfloat16"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype != "bfloat16":
            raise ValueError(f"RoundWeights: dtype={self.dtype!r} must be 'bfloat16'")
        skip = (self.skip,) if isinstance(self.skip, str) else tuple(self.skip)
        object.__setattr__(self, "skip", skip)

    @torch.no_grad()
    def apply(self, model: nn.Module | ExportedProgram) -> RoundingReport:
        """Rounds the weights of ``model`` in place.

        Raises:
            TypeError, ValueError: see `sparsify.pruning.prunable_weights`.
        """
        layers = tuple(
            LayerRounding(weight.names, tuple(weight.tensor.shape), _round(weight.tensor))
            for weight in prunable_weights(model, self.skip)
        )
        return RoundingReport(str(self), layers)


def _round(tensor: torch.Tensor) -> float:
    """Rounds in place; the relative error."""
    rounded = tensor.to(torch.bfloat16).to(tensor.dtype)
    change = (rounded.double() - tensor.double()).norm()
    scale = tensor.double().norm()
    tensor.copy_(rounded)
    return float(change / scale) if scale else 0.0
