"""Needles in editorials: a number told once in a long text, which the model has to give back.

A number has five digits and is told at some depth of the editorials; the question begins the
sentence that told it. It is found when the model's greedy continuation begins with it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.editorials import EDITORIALS, rated

DEPTHS = (0.15, 0.5, 0.85)
ANSWER = 8
"""Tokens of an answer: a digit is a token of some models."""
_SENTENCE = "The secret pass code for the vault is"


@dataclass(frozen=True)
class Needle:
    """One text and its question.

    Attributes:
        length: tokens of the text, roughly; ``depth`` is where in it the number is told.
        text, question: token ids, int64 ``[1, tokens]``; the question follows the text.
    """

    length: int
    depth: float
    number: str
    text: torch.Tensor
    question: torch.Tensor

    @property
    def prompt(self) -> torch.Tensor:
        return torch.cat((self.text, self.question), dim=1)

    def found(self, tokenizer: Any, answer: torch.Tensor) -> bool:
        """Whether tokens that continue the question begin with the number."""
        said: str = tokenizer.decode(answer)
        return said.replace(" ", "").startswith(self.number)


def needles(
    tokenizer: Any,
    lengths: Sequence[int],
    seed: int = 1,
    sentence: str = _SENTENCE,
    source: str = EDITORIALS,
) -> Iterator[Needle]:
    """One for each depth of each length, of texts that begin anywhere in the source.

    Args:
        sentence: what is told and asked, up to the number.
        source: of the text around it, see `rated`.
    """
    chance = random.Random(seed)
    sentences = [text for _, _, text in rated(source)]
    sizes = [len(tokenizer(text).input_ids) for text in sentences]
    question = tokenizer(f"\n\n{sentence}", return_tensors="pt").input_ids
    for length in lengths:
        for depth in DEPTHS:
            number = str(chance.randint(10000, 99999))
            begin = chance.randint(0, 1500)
            text: list[str] = []
            tokens = 0
            told = False
            while tokens <= length:
                tokens += sizes[begin + len(text) - told]
                if not told and tokens > depth * length:
                    text.append(f"{sentence} {number}.")
                    told = True
                text.append(sentences[begin + len(text) - told])
            ids = tokenizer(" ".join(text), return_tensors="pt").input_ids
            yield Needle(length, depth, number, ids, question)
