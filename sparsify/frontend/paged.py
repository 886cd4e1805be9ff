"""How a Hugging Face model is led to the paged cache, without a change to its code.

    key, value = past_key_values.update(key, value, layer)   -> sparsify::kv_append
    attention_interface(self, query, key, value, mask, ...)  -> sparsify::paged_attention

Between the two, the model only hands on what `update` returned. So `CaptureCache.update` returns no
keys and values but what attention needs to find them in the cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sparsify.ops  # noqa: F401  registers the operators

NAME = "sparsify_paged"
"""Our attention in transformers. No mask function has this name, so models build no mask."""


class CaptureCache(Cache):
    """The cache as the operators take it; see `sparsify.ops.kv_append` for the shapes."""

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        pages: torch.Tensor,
        starts: torch.Tensor,
        counts: torch.Tensor,
    ) -> None:
        super().__init__(layers=[])
        self.keys, self.values = keys, values
        self.pages, self.starts, self.counts = pages, starts, counts

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Models ask where positions are not given, which they are."""
        return 0

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        lengths = torch.ops.sparsify.kv_append(
            self.keys,
            self.values,
            _rows(key_states),
            _rows(value_states),
            self.pages,
            self.starts,
            self.counts,
            layer_idx,
            [0, 0],
        )
        appended = _Appended(self, layer_idx, lengths)
        return appended, appended


@dataclass(frozen=True)
class _Appended:
    """Stands for the keys, and for the values, of one layer."""

    cache: CaptureCache
    layer: int
    lengths: torch.Tensor


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``[batch, heads, length, head_dim]`` -> ``[batch, length, heads, head_dim]``."""
    _, heads, _, head_dim = query.shape
    cache = key.cache
    found = torch.ops.sparsify.paged_attention(
        _rows(query),
        cache.keys,
        cache.values,
        cache.pages,
        key.lengths,
        cache.counts,
        key.layer,
        heads,
        0,
        head_dim**-0.5 if scaling is None else float(scaling),
        sliding_window or 0,
        softcap or 0.0,
    )
    return found.unflatten(-1, (heads, head_dim)), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


def _rows(heads: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, length, head_dim]`` -> ``[batch, length, heads * head_dim]``."""
    return heads.transpose(1, 2).flatten(2)


@contextlib.contextmanager
def paged_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model calls our attention meanwhile."""
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    configs = [c for c in found.values() if hasattr(c, "_attn_implementation_internal")]
    own = [c._attn_implementation_internal for c in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, own, strict=True):
            config._attn_implementation_internal = name
