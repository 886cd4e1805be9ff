"""What a pattern is: a rule that says which blocks of keys a block of queries reads."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Pattern(ABC):
    """A frozen dataclass whose fields are whole numbers of blocks, or tuples of them.

    `keep` is all there is to a pattern. It is plain PyTorch on index tensors, and what it does is
    recorded into the program: it must use elementwise operators alone, and then works for every
    length, in every back end and exporter. Causality and the model's own mask are applied besides,
    and a block of queries always reads its own block of keys.
    """

    name: ClassVar[str]
    per_head: ClassVar[bool] = False
    """Whether heads differ."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
            if not whole or any(n < 0 for n in numbers):
                raise ValueError(
                    f"{self.name}: {field.name}={value!r} must count blocks, as whole numbers of "
                    "at least 0"
                )

    @abstractmethod
    def keep(self, query: torch.Tensor, key: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Whether blocks are read, bool.

        Args:
            query, key, head: int64 numbers of the block of queries, of the block of keys and of the
                query head, which broadcast to ``[heads, query_blocks, key_blocks]``.
        """

    def marks(self, blocks: int, heads: int) -> torch.Tensor:
        """What is read of so many blocks, bool ``[heads or 1, blocks, blocks]``."""
        query, key = torch.arange(blocks)[:, None], torch.arange(blocks)
        head = torch.arange(heads if self.per_head else 1)[:, None, None]
        shape = (len(head), blocks, blocks)
        return (self.keep(query, key, head) | (query == key)).expand(shape)

    def __str__(self) -> str:
        options = ", ".join(
            f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self)
        )
        return f"{self.name}({options})"


def at_least(pattern: Pattern, **least: int) -> None:
    """Raises ValueError for a field that is below what the pattern needs."""
    for name, bound in least.items():
        value = getattr(pattern, name)
        if value < bound:
            raise ValueError(f"{pattern.name}: {name}={value} must be at least {bound}")
