"""A language model with its real weights: as transformers runs it, compiled, and in float64."""

from __future__ import annotations

import argparse
import copy
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import sparsify
from sparsify.generation import CompiledCausalLM


@dataclass(frozen=True)
class LanguageModel:
    """Sequences are int64 ``[1, length]``, logits ``[steps, vocabulary]``."""

    eager: Any
    tokenizer: Any
    compiled: CompiledCausalLM

    @classmethod
    def of(cls, eager: Any, tokenizer: Any) -> LanguageModel:
        return cls(eager, tokenizer, sparsify.compile(eager, num_threads=1))

    @property
    def dense_bytes(self) -> int:
        """Of all weights; one that is tied counts once."""
        return sum(p.nbytes for p in self.eager.parameters())

    def prompt(self, text: str) -> torch.Tensor:
        ids: torch.Tensor = self.tokenizer(text, return_tensors="pt").input_ids
        return ids

    def long_prompt(self, length: int) -> torch.Tensor:
        """Source code, cut to that many tokens."""
        ids = self.prompt(inspect.getsource(argparse))[:, :length]
        assert ids.shape[1] == length
        return ids

    def continued(self, prompt: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
        """The prompt and ``new`` greedy tokens of ours."""
        return self.compiled.generate(prompt, max_new_tokens=new, eos_token_id=[], **options)

    def own(self, prompt: torch.Tensor, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt and ``new`` greedy tokens of transformers' own, and the logits of each."""
        found = self.eager.generate(prompt, attention_mask=torch.ones_like(prompt),
            max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return found.sequences, torch.cat(found.logits)

    def logits(self, sequence: torch.Tensor, steps: int) -> torch.Tensor:
        """Ours for each of the last ``steps`` tokens: after a prompt, then after one token more."""
        start = sequence.shape[1] - steps
        cache = self.compiled.new_cache(1, sequence.shape[1])
        pieces = (sequence[:, :start], *sequence[:, start:-1].split(1, dim=1))
        return torch.cat([self.compiled(piece, cache) for piece in pieces])

    def exact_logits(self, sequence: torch.Tensor, steps: int) -> torch.Tensor:
        """The same in float64, all at once."""
        exact = copy.deepcopy(self.eager).double()
        with torch.no_grad():
            found = exact(sequence[:, :-1], logits_to_keep=steps, use_cache=False)
        logits: torch.Tensor = found.logits[0]
        return logits


@pytest.fixture(scope="session")
def language_model() -> type[LanguageModel]:
    return LanguageModel
