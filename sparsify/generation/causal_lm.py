"""A compiled causal language model: prefill, decode, and the loop between them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sparsify.compiled import CompiledModel
from sparsify.entry import Entry
from sparsify.generation.paged_cache import PagedCache, largest_shapes
from sparsify.generation.prompts import Prompts
from sparsify.generation.sampling import Sampling
from sparsify.generation.text_settings import TextSettings
from sparsify.layouts import FEW_TOKENS
from sparsify.ops import CHUNK_TOKENS, CacheShape, chunk_bounds
from sparsify.report import Report

if TYPE_CHECKING:
    from sparsify.codegen.emit.onnx import OnnxSummary

PREFILL, DECODE = "prefill", "decode"
"""Names of the two entry programs: many tokens of each sequence, and one."""

_ROWS = FEW_TOKENS
"""Most rows of one call of a program; larger batches take several."""


class Streamer(Protocol):
    """What transformers' streamers are: told of the prompt, of every token, and of the end."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


class CompiledCausalLM:
    """Generates text with the two programs of a compiled language model.

    They share one copy of the weights and write one `PagedCache`. Calls from several threads may
    overlap, each with its own cache. Make one with `sparsify.compile` or `sparsify.load`.
    """

    def __init__(self, model: CompiledModel, settings: TextSettings) -> None:
        self._model = model
        self.settings = settings
        self._entries = {name: model.entry(name) for name in (PREFILL, DECODE)}
        taken = {wanted.name: wanted.shape for wanted in model.entry(DECODE).inputs}
        self._shape = cache_shape(taken["keys"])
        self._beside = {name: kept_beside(entry) for name, entry in self._entries.items()}

    @property
    def report(self) -> Report:
        """What was decided at each site of the two programs, and why."""
        return self._model.report

    @property
    def compiled(self) -> CompiledModel:
        """The two programs themselves: their graphs, plans and portable forms."""
        return self._model

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory, without any cache."""
        return self._model.nbytes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to one file, for `sparsify.load`; see `CompiledModel.save`."""
        self._model.save(path)

    def export_onnx(
        self, path: str | os.PathLike[str], *, standard: bool = False, entry: str = PREFILL
    ) -> OnnxSummary:
        """Writes an entry as ONNX, see `CompiledModel.export_onnx`.

        ``prefill`` serves any number of new tokens, one included; ``decode`` takes just one. The
        paged cache goes in as ``keys`` and ``values`` and comes out as ``new_keys`` and
        ``new_values``.
        """
        return self._model.export_onnx(path, standard=standard, entry=entry)

    def export_c(
        self,
        directory: str | os.PathLike[str],
        *,
        target: str | None = None,
        name: str = "model",
        batch: int = 1,
        max_tokens: int | None = None,
        chunk: int = CHUNK_TOKENS,
    ) -> None:
        """Writes both programs as C; see `CompiledModel.export_c`.

        ``model_run_prefill`` and ``model_run_decode`` take token ids, ``pages``, ``starts`` and
        ``counts`` as `sparsify.ops.kv_append` does, and share a state, ``keys`` and ``values``.

        Args:
            batch: sequences that the state holds.
            max_tokens: of each; None for all that the model takes.
            chunk: most tokens of one call of prefill, all rows together.

        Raises:
            ValueError: as there, or no sequence, or too many or no tokens.
        """
        most = self._tokens(max_tokens)
        largest = largest_shapes(self._shape, batch, most, chunk, self._kept_beside())
        self._model.export_c(directory, target=target, name=name, largest=largest)

    def new_cache(self, batch: int = 1, max_tokens: int | None = None) -> PagedCache:
        """An empty cache; ``max_tokens`` of a sequence are by default all that the model takes.

        Raises:
            ValueError: no sequence, or fewer or more tokens than there can be.
        """
        return PagedCache(self._shape, batch, self._tokens(max_tokens), self._kept_beside())

    def _kept_beside(self) -> dict[str, tuple[int, ...]]:
        return {name: page for kept in self._beside.values() for name, page in kept.items()}

    def _tokens(self, max_tokens: int | None) -> int:
        most = self.settings.max_positions
        if max_tokens is not None and max_tokens > most:
            raise ValueError(
                f"max_tokens={max_tokens} is more than the {most} positions of the model"
            )
        return most if max_tokens is None else max_tokens

    def __call__(
        self, input_ids: torch.Tensor, cache: PagedCache, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Appends tokens to the sequences of a cache.

        Args:
            input_ids: int64 ``[batch, length]``.
            counts: int64 ``[batch]``, how many of each row are real, the rest being padding at
                its end; None for all.

        Returns:
            float32 ``[batch, vocabulary]``: the logits after the last real token of each row.

        Raises:
            CacheFull: a sequence would outgrow the cache.
            TypeError, ValueError, IndexError: what is wrong with the ids.

        After an error the sequences of the cache are as long as before.
        """
        if input_ids.dim() != 2 or input_ids.shape[0] != cache.batch or not input_ids.shape[1]:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; the cache takes "
                f"[{cache.batch}, length], with at least one token a row"
            )
        batch, length = input_ids.shape
        counts = torch.full((batch,), length) if counts is None else counts
        if counts.shape != (batch,) or not 0 <= int(counts.min()) <= int(counts.max()) <= length:
            raise ValueError(
                f"counts={counts.tolist()} must say for each of {batch} rows how many of its "
                f"{length} tokens are real"
            )
        cache.reserve(counts)
        before = cache.lengths
        try:
            return self._append_in_chunks(input_ids, cache, counts)
        except BaseException:
            cache.lengths = before
            raise

    def _append_in_chunks(
        self, input_ids: torch.Tensor, cache: PagedCache, counts: torch.Tensor
    ) -> torch.Tensor:
        batch, length = input_ids.shape
        bounds = chunk_bounds(length, min(batch, _ROWS))
        name = DECODE if length == 1 else PREFILL
        logits = self._append(name, input_ids[:, : bounds[1]], cache, counts.clamp(max=bounds[1]))
        for begin, end in pairwise(bounds[1:]):
            own = (counts - begin).clamp(0, end - begin)
            found = self._append(name, input_ids[:, begin:end], cache, own)
            # A row that ended in an earlier chunk has its logits already.
            logits = torch.where((counts > begin)[:, None], found, logits)
        return logits

    def _append(
        self, name: str, input_ids: torch.Tensor, cache: PagedCache, counts: torch.Tensor
    ) -> torch.Tensor:
        entry, beside = self._entries[name], {n: cache.beside[n] for n in self._beside[name]}
        of_rows = (input_ids, cache.pages, cache.lengths, counts)
        logits = [
            entry(*(part.contiguous() for part in group), cache.keys, cache.values, **beside)
            for group in zip(*(part.split(_ROWS) for part in of_rows), strict=True)
        ]
        cache.advance(counts)
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def generate(
        self,
        input_ids: torch.Tensor | Sequence[Sequence[int]],
        *,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        streamer: Streamer | None = None,
    ) -> torch.Tensor:
        """Continues prompts.

        Args:
            input_ids: ``[batch, length]``, padded on either side where ``attention_mask`` is 0,
                or rows of different lengths.
            do_sample, temperature, top_k, top_p, seed: see `Sampling`.
            eos_token_id: what ends a row; by default what the model's configuration says.
            streamer: is given the prompt, then each step's tokens, as transformers has it.

        Returns:
            int64 ``[batch, length + new]``: the prompts as they were given (rows padded behind
            with ``pad_token_id``) and at most ``max_new_tokens`` tokens each.

        Raises:
            ValueError: an empty prompt, or prompt and new tokens exceed what the model takes.
        """
        sampling = Sampling(do_sample, temperature, top_k, top_p, seed)
        prompts = Prompts.of(input_ids, attention_mask)
        made = self._steps(prompts, max_new_tokens, sampling, eos_token_id)
        shown = input_ids if isinstance(input_ids, torch.Tensor) else self._padded(prompts)
        if streamer is not None:
            streamer.put(shown)
        steps = []
        for tokens in made:
            steps.append(tokens)
            if streamer is not None:
                streamer.put(tokens)
        if streamer is not None:
            streamer.end()
        return torch.cat([shown, *(tokens[:, None] for tokens in steps)], dim=1)

    def stream(
        self,
        input_ids: torch.Tensor | Sequence[Sequence[int]],
        *,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Like `generate`, but yields each step's tokens, int64 ``[batch]``, as they come."""
        sampling = Sampling(do_sample, temperature, top_k, top_p, seed)
        prompts = Prompts.of(input_ids, attention_mask)
        return self._steps(prompts, max_new_tokens, sampling, eos_token_id)

    def as_transformers(self) -> Any:
        """The model as a ``transformers`` model, for its ``generate`` and pipelines.

        Raises:
            ImportError: transformers is not installed.
        """
        from sparsify.generation.huggingface import adapt

        return adapt(self)

    def _steps(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        sampling: Sampling,
        eos_token_id: int | Sequence[int] | None,
    ) -> Iterator[torch.Tensor]:
        """Checks the lengths at once, and works when the iterator is asked."""
        longest = int(prompts.counts.max()) + max_new_tokens
        if max_new_tokens < 1 or longest > self.settings.max_positions:
            raise ValueError(
                f"the longest prompt has {int(prompts.counts.max())} tokens and "
                f"max_new_tokens={max_new_tokens}: new tokens must be at least 1, and both "
                f"together at most the {self.settings.max_positions} positions of the model"
            )
        ends = torch.tensor(self._ends(eos_token_id), dtype=torch.int64)
        cache = self.new_cache(len(prompts.ids), longest)
        return self._loop(prompts, cache, max_new_tokens, sampling, ends)

    def _loop(
        self,
        prompts: Prompts,
        cache: PagedCache,
        max_new_tokens: int,
        sampling: Sampling,
        ends: torch.Tensor,
    ) -> Iterator[torch.Tensor]:
        source = sampling.generator()
        logits = self(prompts.ids, cache, prompts.counts)
        open_rows = torch.ones(len(prompts.ids), dtype=torch.bool)
        for step in range(max_new_tokens):
            tokens = sampling.choose(logits, source)
            tokens = torch.where(open_rows, tokens, self.settings.pad_token_id)
            yield tokens
            open_rows &= ~torch.isin(tokens, ends)
            if step + 1 == max_new_tokens or not bool(open_rows.any()):
                return
            logits = self(tokens[:, None], cache, open_rows.long())

    def _ends(self, eos_token_id: int | Sequence[int] | None) -> list[int]:
        if eos_token_id is None:
            return list(self.settings.eos_token_ids)
        return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)

    def _padded(self, prompts: Prompts) -> torch.Tensor:
        behind = torch.arange(prompts.ids.shape[1]) >= prompts.counts[:, None]
        return prompts.ids.masked_fill(behind, self.settings.pad_token_id)

    def __repr__(self) -> str:
        return (
            f"CompiledCausalLM({self._shape.layers} layers, up to {self.settings.max_positions} "
            f"tokens, target={self.report.target!r})"
        )


def cache_shape(keys: Sequence[Any]) -> CacheShape:
    """What the shape of the keys that a model's programs take says of its cache."""
    layers, _, kv_heads, head_dim, _ = keys
    return CacheShape(int(layers), int(kv_heads), int(head_dim))


def kept_beside(entry: Entry) -> dict[str, tuple[int, ...]]:
    """What an entry keeps about pages beside keys and values: the shape of one page, by name."""
    return {
        wanted.name: tuple(int(extent) for extent in wanted.shape[2:])
        for wanted in entry.inputs
        if wanted.state and wanted.name not in ("keys", "values")
    }
