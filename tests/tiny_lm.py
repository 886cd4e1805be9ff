"""Small causal language models with random weights, and a plain loop that decodes greedily."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sparsify.frontend.causal_lm import import_causal_lm
from sparsify.ops import PAGE, CacheShape
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.program import ProgramSet

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
# Tied, the scaled embeddings would outweigh the layers, and every token would be its predecessor.
GEMMA = {"sliding_window": 5, "query_pre_attn_scalar": 6, "tie_word_embeddings": False}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def _random(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(torch.rand_like(weight) * 0.5)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _random(
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    ),
    "gemma3": lambda: _random(
        lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **{**SIZES, **GEMMA, "num_hidden_layers": 3, "layer_types": MIXED},
            )
        )
    ),
    "gemma2": lambda: _random(
        lambda: Gemma2ForCausalLM(
            Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=2.0)
        )
    ),
    "mistral": lambda: _random(
        lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5))
    ),
    "mixtral": lambda: _random(
        lambda: MixtralForCausalLM(
            MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
        )
    ),
    "qwen2": lambda: _random(
        lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}))
    ),
    "qwen3": lambda: _random(lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES))),
    "olmoe": lambda: _random(
        lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2))
    ),
    "qwen3_moe": lambda: _random(
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        )
    ),
}


@cache
def portable_programs(name: str) -> ProgramSet:
    """A model's portable programs; passes leave them as they are, so all tests share them."""
    return run_pipeline(import_causal_lm(MODELS[name]()), PORTABLE).programs


def prompts(vocabulary: int, lengths: Sequence[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, vocabulary, (n,), generator=generator) for n in lengths]


def own_tokens(model: PreTrainedModel, prompt: torch.Tensor, new: int) -> list[int]:
    """What transformers itself generates, one sequence at a time."""
    ids = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=new,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return ids[0, len(prompt) :].tolist()


def paged_tokens(
    programs: ProgramSet, shape: CacheShape, rows: Sequence[torch.Tensor], new: int, chunk: int
) -> list[list[int]]:
    """Greedy decoding of ragged prompts in one batch, prompts in chunks of at most ``chunk``."""
    batch, longest = len(rows), max(map(len, rows))
    width = -(-(longest + new) // PAGE)
    # What lies beyond a row's tokens must not be read.
    keys, values = (part.fill_(torch.nan) for part in shape.zeros(batch * width + 3))
    beside = {
        node.name: torch.full((shape.layers, len(keys[0]), *node.meta["val"].shape[2:]), torch.nan)
        for node in programs["decode"].state()
        if node.name not in ("keys", "values")
    }
    order = torch.randperm(batch * width + 3, generator=torch.Generator().manual_seed(1))
    pages = order[: batch * width].to(torch.int32).reshape(batch, width)
    starts = torch.zeros(batch, dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    logits = torch.zeros(batch, 0)
    bounds = [*range(0, longest, chunk), longest]
    for begin, end in pairwise(bounds):
        ids = torch.zeros(batch, end - begin, dtype=torch.int64)
        for row, prompt in enumerate(rows):
            piece = prompt[begin:end]
            ids[row, : len(piece)] = piece
        counts = (lengths - begin).clamp(0, end - begin)
        found = programs["prefill"].run(ids, pages, starts, counts, keys, values, **beside)
        logits = found if not logits.numel() else torch.where(counts[:, None] > 0, found, logits)
        starts = starts + counts
    tokens = logits.argmax(-1)
    result = [tokens]
    one = torch.ones_like(starts)
    for _ in range(new - 1):
        given = (tokens[:, None], pages, starts, one, keys, values)
        logits = programs["decode"].run(*given, **beside)
        tokens, starts = logits.argmax(-1), starts + 1
        result.append(tokens)
    return torch.stack(result, 1).tolist()
