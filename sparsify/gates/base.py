"""What a gate is: a rule that says which features of a token are kept, and the registry of rules.

A gate is a frozen dataclass whose fields are its parameters of the same value for all models of a
shape; its spec is text, ``top_k{k=512}``. What depends on a model's weights and data is in tensors
beside it, which `calibrate` makes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsify.specs import Registry, spec_of


@dataclass(frozen=True)
class Calibrated:
    """A gate with the tensors that it was given on data, in the order of ``Gate.parameters``."""

    gate: Gate
    parameters: tuple[torch.Tensor, ...]

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate.keep(x, *self.parameters)


@dataclass(frozen=True)
class Gate(ABC):
    """A rule that keeps some of the features of each token, whatever the other tokens are."""

    name: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]] = ()
    """Names of the parameter tensors, in the order in which operators carry them."""

    @abstractmethod
    def keep(self, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        """Which features are kept, bool of ``x``'s shape ``[..., features]``; NaN is."""

    @abstractmethod
    def shapes(self, features: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of the parameter tensors, which are float32.

        Raises:
            ValueError: the gate does not work on so many features.
        """

    @classmethod
    @abstractmethod
    def calibrate(
        cls, samples: torch.Tensor, sparsity: float, importance: torch.Tensor
    ) -> Calibrated:
        """The gate that drops the fraction ``sparsity`` of the features of ``samples``.

        Args:
            samples: ``[tokens, features]`` of calibration data, at least one token.
            sparsity: above 0, below 1.
            importance: ``[features]``, not negative: what a feature's magnitude counts; rules
                that weigh all features alike leave it aside.
        """

    def check(self, features: int, parameters: Any) -> None:
        """Raises ValueError, naming the cause, unless the parameters serve so many features."""
        wanted = self.shapes(features)
        found = tuple(tuple(p.shape) for p in parameters)
        if found != wanted:
            names = ", ".join(self.parameters) or "no parameters"
            raise ValueError(
                f"gate {self.spec}: takes {names} of shapes {list(wanted)} for {features} "
                f"features; given are {list(found)}"
            )

    @property
    def spec(self) -> str:
        return spec_of(self)

    def __str__(self) -> str:
        return self.spec


GATES: Registry[Gate] = Registry("gate")
"""Every gate by its name."""

register = GATES.register
gate_names = GATES.names
parse = GATES.parse


def quantile(values: torch.Tensor, fraction: float) -> float:
    """The value that the fraction of all values does not exceed; no interpolation, any size."""
    flat = values.flatten()
    return float(flat.kthvalue(min(max(1, round(fraction * flat.numel())), flat.numel())).values)


def check_count(gate: str, k: int, features: int) -> None:
    """Raises ValueError unless ``k`` of the features can be chosen."""
    if not 0 < k <= features:
        raise ValueError(f"gate {gate}: cannot keep {k} of {features} features")


def kept_count(samples: torch.Tensor, sparsity: float) -> int:
    """How many features of a token are kept, at least one."""
    features = samples.shape[-1]
    return min(features, max(1, round((1 - sparsity) * features)))
