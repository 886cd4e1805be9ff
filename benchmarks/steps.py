"""One step of a Hugging Face language model as a module that peers can export."""

from __future__ import annotations

from typing import Any

import torch


class DecodeStep(torch.nn.Module):
    """One token more: ids ``[batch, 1]`` and past keys and values to logits, and both grown.

    The past is ``key, value`` of each layer, ``[batch, kv_heads, length, head_dim]``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(key, value, layer)
        logits = self.model(input_ids, past_key_values=cache, use_cache=True).logits[:, -1]
        grown = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return (logits, *grown)
