"""A compiled language model as a transformers model, so that its ``generate`` runs on our programs.

transformers chooses tokens, stops and streams; each of its forward calls is one of our programs
over a paged cache, which travels as ``past_key_values``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparsify.generation.prompts import Prompts

if TYPE_CHECKING:
    from sparsify.generation.causal_lm import CompiledCausalLM
    from sparsify.generation.paged_cache import PagedCache


class PagedPast(Cache):
    """A `PagedCache` in the place of transformers' own caches.

    transformers counts columns of the padded batch, the cache real tokens.
    """

    def __init__(self, cache: PagedCache) -> None:
        super().__init__(layers=[])
        self.cache = cache
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int = 0) -> int:
        return self.cache.max_tokens

    @property
    def is_compileable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise NotImplementedError(
            "beam search reorders the sequences of a cache, which a paged cache does not; "
            "use num_beams=1 (greedy or sampled)"
        )


_REFUSED = ("inputs_embeds", "labels", "output_attentions", "output_hidden_states")
_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "auto_map")
"""Entries of a configuration that make transformers look for code."""


class CompiledForCausalLM(PreTrainedModel, GenerationMixin):
    """Only ``generate`` and ``forward`` without gradients; logits are those of the last token."""

    _no_weights = True
    _is_stateful = True
    """A cache cannot be cut back, as generation with an assistant would."""

    def __init__(self, compiled: CompiledCausalLM, config: Any) -> None:
        super().__init__(config)
        self._compiled = [compiled]  # in a list: it is no module
        # transformers asks the parameters for dtype and device.
        self.nothing = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: PagedPast | None = None,
        return_dict: bool = True,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Appends ``input_ids`` to the cache; ``logits`` are ``[batch, 1, vocabulary]``.

        Raises:
            ValueError: an input that the compiled programs do not take.
        """
        given = [
            name
            for name in _REFUSED
            if isinstance(unused.get(name), torch.Tensor) or unused.get(name)
        ]
        if given or input_ids is None:
            raise ValueError(f"a compiled model takes input_ids, not {', '.join(given) or 'None'}")
        if not isinstance(past_key_values, PagedPast | None):
            raise ValueError(
                f"past_key_values is {type(past_key_values).__name__}; a compiled model has a "
                "paged cache of its own: pass None, or what an earlier call returned"
            )
        compiled = self._compiled[0]
        # A cache without layers is false.
        past = past_key_values
        if past is None:
            past = PagedPast(compiled.new_cache(len(input_ids)))
        columns = input_ids.shape[1]
        new = None if attention_mask is None else attention_mask[:, -columns:]
        prompts = Prompts.of(input_ids, new)
        logits = compiled(prompts.ids, past.cache, prompts.counts)
        past.columns += columns
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=past)


def adapt(compiled: CompiledCausalLM) -> CompiledForCausalLM:
    """The adapter, configured as the model was."""
    record = dict(compiled.settings.config)
    record = {name: value for name, value in record.items() if name not in _CODE}
    config = AutoConfig.for_model(record.pop("model_type"), **record)
    model = CompiledForCausalLM(compiled, config).eval()
    model.generation_config.use_cache = True
    model.generation_config.eos_token_id = list(compiled.settings.eos_token_ids) or None
    model.generation_config.pad_token_id = compiled.settings.pad_token_id
    return model
