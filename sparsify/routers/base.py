"""What a router is: a rule that sends each token to some of the experts, and the registry of rules.

A router is a frozen dataclass whose fields are integers; its spec is text,
``softmax_top_k{k=2,normalise=1}``. Numbers that are not integers, and what was trained, are in
tensors beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsify.specs import Registry, spec_of

Routes = tuple[torch.Tensor, torch.Tensor]
"""Experts, int32 ``[tokens, slots]``, and their weights, float32; see `Router.route`."""

UNUSED = -1
"""The expert of a slot that a token leaves empty."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of code that may be a router: all it has beside a token's logits.

    Attributes:
        experts: how many there are.
        slots: experts of a token at most; None where that does not show.
        numbers: constants, whole ones among them.
        tensors: float32 constants.
    """

    experts: int
    slots: int | None
    numbers: tuple[float, ...] = ()
    tensors: tuple[torch.Tensor, ...] = ()

    def counts(self) -> Sequence[int]:
        """The experts that a token may have."""
        return range(1, self.experts + 1) if self.slots is None else (self.slots,)

    def integers(self, most: int) -> list[int]:
        """The whole numbers from 1 to ``most`` among the constants."""
        whole = (int(n) for n in self.numbers if float(n).is_integer())
        return sorted({n for n in whole if 1 <= n <= most})

    def scalars(self, *others: float) -> list[torch.Tensor]:
        """Some numbers and the constants, ``[1]`` each."""
        single = [float(t) for t in self.tensors if t.numel() == 1]
        return [torch.tensor([n]) for n in dict.fromkeys((*others, *self.numbers, *single))]

    def vectors(self, start: float) -> list[torch.Tensor]:
        """One of the same number everywhere and the constants, ``[experts]`` each."""
        found = [t.reshape(-1) for t in self.tensors if t.numel() == self.experts]
        return [torch.full((self.experts,), start), *found]


@dataclass(frozen=True)
class Router(ABC):
    """A rule that chooses experts for each token, whatever the other tokens are."""

    name: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]] = ()
    """Names of the parameter tensors, in the order in which operators carry them."""

    @abstractmethod
    def route(self, logits: torch.Tensor, *parameters: torch.Tensor) -> Routes:
        """The experts of each token and what their results are weighted with.

        Args:
            logits: float32 ``[tokens, width]``.

        Returns:
            Both ``[tokens, slots]``; slots that a token does not use come last, with the expert -1
            and the weight 0. No token has an expert twice.
        """

    @classmethod
    def candidates(cls, seen: Seen) -> Iterator[Candidate]:
        """Routers of this kind, with parameters, that code may be of which this is known.

        By default none: then the router is only ever called by its spec.
        """
        yield from ()

    def decided(self, logits: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        """Tokens, bool ``[tokens]``, of which no two experts tie for the last slot: where rounding
        makes keys equal, programs of one router may choose differently."""
        return torch.ones(len(logits), dtype=torch.bool)

    def experts(self, width: int) -> int:
        """How many experts there are when each token has so many logits."""
        return width

    def slots(self, experts: int) -> int:
        """The most experts of a token."""
        return experts

    def shapes(self, experts: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of the parameter tensors, which are float32."""
        return ()

    def check(self, width: int, parameters: Sequence[torch.Tensor]) -> None:
        """Raises ValueError, naming the cause, unless logits and parameters fit the router."""
        experts = self.experts(width)
        if not 0 < self.slots(experts) <= experts:
            raise ValueError(
                f"router {self.spec}: chooses {self.slots(experts)} of {experts} experts; "
                "it must be at least one and at most all"
            )
        wanted = self.shapes(experts)
        found = tuple(tuple(p.shape) for p in parameters)
        if found != wanted:
            names = ", ".join(self.parameters) or "no parameters"
            raise ValueError(
                f"router {self.spec}: takes {names} of shapes {list(wanted)} for {experts} "
                f"experts; given are {list(found)}"
            )

    @property
    def spec(self) -> str:
        return spec_of(self)

    def __str__(self) -> str:
        return self.spec


Candidate = tuple[Router, tuple[torch.Tensor, ...]]
"""A router and its parameters."""


def largest(keys: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest keys and their indices, the first of equal ones first, as in ONNX's ``TopK``."""
    order = keys.argsort(dim=-1, descending=True, stable=True)[..., :count]
    indices = order.clone(memory_format=torch.contiguous_format)
    return keys.gather(-1, indices), indices


def used(experts: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> Routes:
    """Routes whose slots are empty where they are not chosen."""
    return (
        experts.masked_fill(~chosen, UNUSED).to(torch.int32),
        weights.masked_fill(~chosen, 0.0),
    )


ROUTERS: Registry[Router] = Registry("router")
"""Every router by its name."""

register = ROUTERS.register
router_names = ROUTERS.names
parse = ROUTERS.parse
