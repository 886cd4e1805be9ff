"""`prune`, the form of a pruning method, and the account of what was pruned."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import torch
from rich.table import Table
from torch import nn
from torch.export import ExportedProgram

Model = TypeVar("Model", nn.Module, ExportedProgram)


@dataclass(frozen=True)
class LayerSparsity:
    """Zeros in one weight before and after; ``names`` are all layers that share it."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    zeros_before: int
    zeros_after: int

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def sparsity(self) -> float:
        """Zeros over elements after pruning."""
        return self.zeros_after / max(1, self.elements)


@dataclass(frozen=True)
class PruneReport:
    """What a method did, layer by layer in the model's order."""

    method: str
    layers: tuple[LayerSparsity, ...]

    def __iter__(self) -> Iterator[LayerSparsity]:
        return iter(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Every pruned layer, tied ones included."""
        return tuple(name for layer in self.layers for name in layer.names)

    @property
    def sparsity(self) -> float:
        """Zeros over elements in all pruned weights together."""
        elements = sum(layer.elements for layer in self.layers)
        return sum(layer.zeros_after for layer in self.layers) / max(1, elements)

    def to_dict(self) -> dict[str, Any]:
        layers = [
            {**asdict(x), "names": list(x.names), "shape": list(x.shape), "sparsity": x.sparsity}
            for x in self.layers
        ]
        return {"method": self.method, "sparsity": self.sparsity, "layers": layers}

    def table(self) -> Table:
        table = Table(
            title=f"{self.method}: {self.sparsity:.2%} zeros in {len(self.layers)} weights"
        )
        for name in ("layer", "shape"):
            table.add_column(name)
        for name in ("zeros before", "zeros after"):
            table.add_column(name, justify="right")
        for layer in self.layers:
            table.add_row(
                "\n".join(layer.names),
                "x".join(map(str, layer.shape)),
                f"{layer.zeros_before / max(1, layer.elements):.1%}",
                f"{layer.sparsity:.1%}",
            )
        return table

    def __rich__(self) -> Table:
        return self.table()


class Pruner(Protocol):
    """A method that changes weights: a frozen dataclass whose fields are its options."""

    def apply(self, model: nn.Module | ExportedProgram) -> Any:
        """Changes the model in place and returns a report, of pruning a `PruneReport`."""
        ...


def prune(model: Model, method: Pruner, *, inplace: bool = False) -> Model:
    """Prunes a copy of the model, or the model itself, and returns it.

    ``method.apply(model)`` prunes in place and returns a `PruneReport` with the counts.

    Args:
        model: an nn.Module or ExportedProgram.
        method: such as ``Unstructured(0.8)``.
        inplace: prune the given model instead of a copy.

    Raises:
        TypeError: ``method`` is not a pruning method.
        ValueError: nothing can be pruned; the message names the layer or pattern.
    """
    if not callable(getattr(method, "apply", None)) or isinstance(method, type):
        raise TypeError(
            f"prune: {method!r} is no pruning method; pass one such as Unstructured(0.8)"
        )
    if isinstance(model, nn.Module | ExportedProgram) and not inplace:
        model = copy.deepcopy(model)
    method.apply(model)
    return model


def count_zeros(tensors: Iterable[torch.Tensor]) -> list[int]:
    return [tensor.numel() - int(torch.count_nonzero(tensor)) for tensor in tensors]
