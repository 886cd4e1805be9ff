"""Hugging Face causal language models into one ProgramSet of two programs over one set of weights.

    prefill: input_ids [batch, length], pages, starts, counts, keys, values -> logits
    decode:  input_ids [batch, 1],      pages, starts, counts, keys, values -> logits

Both append the new tokens to the paged cache ``keys``, ``values``, in place, and attend over it;
the other inputs are those of `sparsify.ops.kv_append`. Logits are ``[batch, vocabulary]``, of the
last real token of each row. A batch has at most `FEW_TOKENS` rows, so that a step is one of few
tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from sparsify.frontend.checks import check_weights
from sparsify.frontend.mixtures import mixtures
from sparsify.frontend.normalise import normalise
from sparsify.frontend.torch import evaluation, first_line, place
from sparsify.frontend.windows import check_windows
from sparsify.layouts import FEW_TOKENS
from sparsify.ops import PAGE, CacheShape
from sparsify.program import ProgramSet
from sparsify.rewriter import share_weights

ENTRIES = ("prefill", "decode")
INPUTS = ("input_ids", "pages", "starts", "counts", "keys", "values")
EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 64
"""Sizes of the example inputs of prefill, for which passes decide."""

_PROBE = 6
"""Tokens on which a captured program is compared with its model."""
_TOLERANCE = 1e-3
"""Of the scale of the logits. Other mathematics differ by more, another order of sums by less."""


def is_causal_lm(model: Any) -> bool:
    """Whether a model is one of transformers that generates text."""
    return _is_pretrained(model) and bool(model.can_generate())


def _is_pretrained(model: Any) -> bool:
    transformers = sys.modules.get("transformers")  # else it can be none of its models
    return isinstance(model, getattr(transformers, "PreTrainedModel", ()))


def import_causal_lm(model: torch.nn.Module) -> ProgramSet:
    """The programs ``prefill`` and ``decode`` of a causal language model, in normal form.

    Args:
        model: a float32 ``transformers`` model with a language-model head. It is not changed.

    Raises:
        TypeError, ValueError: naming the model's class, and why it cannot be captured.
    """
    return normalise_causal_lm(capture_causal_lm(model))


def normalise_causal_lm(captured: Mapping[str, ExportedProgram]) -> ProgramSet:
    """What `capture_causal_lm` returned in the compiler's normal form."""
    programs = (normalise(program, name)[name] for name, program in captured.items())
    return share_weights(ProgramSet(tuple(programs)))


def capture_causal_lm(model: torch.nn.Module) -> dict[str, ExportedProgram]:
    """``prefill`` and ``decode`` as torch.export sees them; arguments as `import_causal_lm`."""
    name = type(model).__name__
    _check_kind(model)
    check_weights(dict(model.named_parameters()), dict(model.named_buffers()))
    from sparsify.frontend.paged import paged_attention

    with torch.no_grad(), evaluation(model):
        reference = _Reference.of(model)
        shape = reference.shape
        with paged_attention(model), mixtures(model):
            captured = {entry: _export(model, entry, shape) for entry in ENTRIES}
        for exported in captured.values():
            check_windows(model, exported)
        reference.compare(name, captured)
    return captured


def _check_kind(model: Any) -> None:
    name = type(model).__name__
    if not _is_pretrained(model):
        raise TypeError(
            f"model must be a causal language model of transformers, not {name}; compile any "
            "other module with sparsify.compile(model, example_inputs)"
        )
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder model, which has a second cache for cross attention; "
            "only decoder-only models can be captured"
        )
    if model.get_output_embeddings() is None or not model.can_generate():
        raise ValueError(
            f"{name} has no language-model head to give logits; load the checkpoint with "
            "AutoModelForCausalLM"
        )
    if getattr(config, "attention_chunk_size", None):
        raise ValueError(
            f"{name} attends within chunks of {config.attention_chunk_size} tokens; the paged "
            "attention is causal, over everything or over a sliding window"
        )


@dataclass(frozen=True)
class _Reference:
    """What the model itself computes for a few tokens, with its own cache."""

    ids: torch.Tensor
    logits: torch.Tensor
    shape: CacheShape

    @classmethod
    def of(cls, model: Any) -> _Reference:
        name = type(model).__name__
        vocabulary = model.get_output_embeddings().weight.shape[0]
        ids = torch.arange(1, 2 * _PROBE + 1).reshape(2, _PROBE) % vocabulary
        try:
            result = model(input_ids=ids, use_cache=True)
        except Exception as cause:
            raise ValueError(
                f"{name} fails on input_ids of shape {tuple(ids.shape)} before any capture: "
                f"{first_line(cause)}{place(cause)}"
            ) from cause
        return cls(ids, result.logits, _cache_shape(name, getattr(result, "past_key_values", None)))

    def compare(self, name: str, captured: Mapping[str, ExportedProgram]) -> None:
        """Refuses programs that differ from the model, for rows of other lengths and for one token.

        Raises:
            ValueError: naming the program, and by how much it is off.
        """
        prefill, decode = (captured[entry].module() for entry in ENTRIES)
        counts = torch.tensor([_PROBE - 2, _PROBE - 3])
        pages = torch.tensor([[1], [0]], dtype=torch.int32)
        cache = self.shape.zeros(2)
        rows, none = torch.arange(2), torch.zeros(2, dtype=torch.int64)
        prompt = self.ids[:, : _PROBE - 2]
        self._check(
            f"prefill of {name}", prefill(prompt, pages, none, counts, *cache), rows, counts - 1
        )
        token = self.ids[rows, counts][:, None]
        found = decode(token, pages, counts, torch.ones_like(counts), *cache)
        self._check(f"decode of {name}", found, rows, counts)
        one = (self.ids[:1, :1], pages[:1] * 0, none[:1], none[:1] + 1, *self.shape.zeros(1))
        self._check(f"prefill of {name} on one token", prefill(*one), rows[:1], none[:1])
        self._check(f"decode of {name} on one row", decode(*one), rows[:1], none[:1])

    def _check(
        self, what: str, found: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> None:
        expected = self.logits[rows, positions]
        error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        if found.shape != expected.shape or not error <= _TOLERANCE:
            raise ValueError(
                f"{what}: through the paged cache the logits differ from the model's own by "
                f"{float(error):.0e} of their scale; its attention does more than causal softmax "
                "with a window and a soft cap (sinks, biases, bidirectional parts), or depends on "
                "the batch beside it"
            )


def _cache_shape(name: str, cache: Any) -> CacheShape:
    """The sizes of the cache that a model has filled."""
    layers = getattr(cache, "layers", None)
    if not layers:
        raise ValueError(
            f"{name} returns {type(cache).__name__} as its cache, not a cache of keys and values "
            "for each layer; models with recurrent state (Mamba, RWKV) cannot be captured"
        )
    shapes = []
    for index, layer in enumerate(layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
            raise ValueError(
                f"{name} keeps no keys and values in layer {index} ({type(layer).__name__}); "
                "recurrent layers, and layers that share the cache of others, cannot be captured"
            )
        if hasattr(layer, "conv_states") or hasattr(layer, "indexer_keys"):
            raise ValueError(
                f"{name} keeps more than keys and values in layer {index} "
                f"({type(layer).__name__}), which the paged cache has no place for"
            )
        if keys.shape[1:2] + keys.shape[3:] != values.shape[1:2] + values.shape[3:]:
            raise ValueError(
                f"{name} has keys {list(keys.shape)} and values {list(values.shape)} in layer "
                f"{index}; the paged cache takes heads of one size"
            )
        shapes.append((keys.shape[1], keys.shape[3]))
    odd = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is not None:
        raise ValueError(
            f"{name} has {shapes[0][0]} key heads of {shapes[0][1]} features in layer 0 and "
            f"{shapes[odd][0]} of {shapes[odd][1]} in layer {odd}; the paged cache has one shape "
            "for all layers"
        )
    return CacheShape(len(shapes), *shapes[0])


class _Step(torch.nn.Module):
    """One entry of a model: its forward over the paged cache."""

    def __init__(self, model: Any, entry: str) -> None:
        super().__init__()
        self.model: Any = model
        self.entry = entry

    def forward(
        self,
        input_ids: torch.Tensor,
        pages: torch.Tensor,
        starts: torch.Tensor,
        counts: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        from sparsify.frontend.paged import CaptureCache

        def last(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            """The head computes logits of the last real tokens only."""
            hidden = args[0]
            if self.entry == "decode":
                return (hidden.flatten(0, 1), *args[1:])
            batch, length = hidden.shape[:2]
            # A row without a real token has no logits; those of its first place are returned.
            chosen = torch.arange(batch) * length + (counts - 1).clamp(min=0)
            return (hidden.flatten(0, 1).index_select(0, chosen), *args[1:])

        positions = starts.unsqueeze(1)
        if self.entry == "prefill":
            positions = positions + torch.arange(input_ids.shape[1])
        hook = self.model.get_output_embeddings().register_forward_pre_hook(last)
        try:
            return self.model(
                input_ids=input_ids,
                position_ids=positions,
                past_key_values=CaptureCache(keys, values, pages, starts, counts),
                use_cache=True,
            ).logits
        finally:
            hook.remove()


def _export(model: Any, entry: str, shape: CacheShape) -> ExportedProgram:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    # The last position of the examples is that of the token after the longest row.
    positions = getattr(model.config, "max_position_embeddings", EXAMPLE_LENGTH + 1)
    length = min(EXAMPLE_LENGTH, positions - 1)
    examples = example_inputs(entry, shape, vocabulary, length)
    batch = Dim("batch", min=1, max=FEW_TOKENS)
    length, width, pages = (Dim(n, min=1) for n in ("length", "width", "pages"))
    shapes = {
        "input_ids": {0: batch, 1: length} if entry == "prefill" else {0: batch},
        "pages": {0: batch, 1: width},
        "starts": {0: batch},
        "counts": {0: batch},
        "keys": {1: pages},
        "values": {1: pages},
    }
    try:
        exported = torch.export.export(_Step(model, entry), examples, dynamic_shapes=shapes)
    except Exception as cause:
        raise ValueError(
            f"the {entry} step of {type(model).__name__} cannot be exported: "
            f"{type(cause).__name__}: {first_line(cause)}{place(cause)}; its attention must go "
            "through the attention interface of transformers, and its code (as in loops over the "
            "experts of a mixture) must not branch on data"
        ) from cause
    return _named_like_the_model(exported)


def example_inputs(
    entry: str, shape: CacheShape, vocabulary: int, length: int
) -> tuple[torch.Tensor, ...]:
    """Two rows of ``length`` tokens and fewer; the cache holds something, its pages in no order."""
    width = -(-length // PAGE) + 1
    generator = torch.Generator().manual_seed(0)
    new = length if entry == "prefill" else 1
    ids = torch.randint(vocabulary, (EXAMPLE_BATCH, new), generator=generator)
    pages = torch.randperm(EXAMPLE_BATCH * width, generator=generator, dtype=torch.int32)
    rows = torch.arange(EXAMPLE_BATCH)
    if entry == "prefill":
        starts, counts = rows * 0, length - rows * (length // 4)
    else:
        starts, counts = length - rows * (length // 4), torch.ones_like(rows)
    cache = shape.zeros(EXAMPLE_BATCH * width)
    keys, values = (torch.randn(part.shape, generator=generator) for part in cache)
    return ids, pages.reshape(EXAMPLE_BATCH, width), starts, counts, keys, values


def _named_like_the_model(exported: ExportedProgram) -> ExportedProgram:
    """Weights under the names that the model gives them, without the wrapper's ``model.``."""

    def own(target: str | None) -> str | None:
        return None if target is None else target.removeprefix("model.")

    signature = exported.graph_signature
    signature = replace(
        signature,
        input_specs=[replace(s, target=own(s.target)) for s in signature.input_specs],
    )
    return ExportedProgram(
        root=exported.graph_module,
        graph=exported.graph,
        graph_signature=signature,
        state_dict={str(own(n)): t for n, t in exported.state_dict.items()},
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants={str(own(n)): t for n, t in exported.constants.items()},
        verifiers=exported.verifiers,
    )
