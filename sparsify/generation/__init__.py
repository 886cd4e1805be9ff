"""Text from compiled language models: the paged cache, sampling, and the loop over tokens."""

from sparsify.generation.causal_lm import CompiledCausalLM
from sparsify.generation.paged_cache import CacheFull, PagedCache
from sparsify.generation.sampling import Sampling
from sparsify.generation.text_settings import TextSettings

__all__ = ["CacheFull", "CompiledCausalLM", "PagedCache", "Sampling", "TextSettings"]
