"""A prompt's way through a language model, up to the logits after its last token."""

from __future__ import annotations

from typing import Any

import torch


class PrefillStep(torch.nn.Module):
    """``input_ids [batch, length]`` to the logits after the last token, ``[batch, vocabulary]``.

    A Hugging Face language model as a module that peers can export.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1]


class CompiledPrefill:
    """The same by a `CompiledCausalLM`; every call begins with an empty cache."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.compiled(input_ids, self.compiled.new_cache(*input_ids.shape))
        return logits
