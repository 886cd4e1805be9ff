"""How the next token is chosen from the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """Greedy by default; with ``do_sample`` a draw from the filtered distribution.

    Attributes:
        temperature: divides the logits; above 0.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities sum to p; 1 keeps all. Source:
            Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.
        seed: of the draws; None for a new one each time.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p} shape "
                "the draws, and there are none: set do_sample=True, or leave them out"
            )
        if not self.temperature > 0 or not math.isfinite(self.temperature):
            raise ValueError(
                f"temperature={self.temperature} must be above 0; for the likeliest token "
                "leave do_sample=False"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")

    def generator(self) -> torch.Generator:
        """The source of one run's draws."""
        source = torch.Generator()
        if self.seed is None:
            source.seed()
        else:
            source.manual_seed(self.seed)
        return source

    def choose(self, logits: torch.Tensor, source: torch.Generator) -> torch.Tensor:
        """int64 ``[batch]`` from logits ``[batch, vocabulary]``."""
        if not self.do_sample:
            return logits.argmax(-1)
        weights = torch.softmax(self._filtered(logits / self.temperature), -1)
        return torch.multinomial(weights, 1, generator=source).squeeze(-1)

    def _filtered(self, logits: torch.Tensor) -> torch.Tensor:
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            weights = ordered.softmax(-1)
            # A token stays while those before it sum to less than p: one always does.
            dropped = weights.cumsum(-1) - weights >= self.top_p
            logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)
        return logits
