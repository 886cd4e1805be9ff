"""What SmolLM2-135M still finds with sparse attention over its cache: needles in editorials.

    python -m benchmarks.attention_quality
    python -m benchmarks.attention_quality --part prefill --methods pooled_blocks --lengths 1000

Parts:

- ``prefill``: prompts of a text with a needle and its question are read by recipes that select
  blocks at ``--density`` percent; the answer is generated with all of the cache.
- ``decode``: the text is read whole; the question and the answer go token by token, over at most
  ``--budget`` tokens of the cache, as Quest is measured by its authors. Perplexity is that of the
  last ``--steps`` tokens of a text of the greatest length, which go the same way.

A needle is found when the answer begins with its number.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console

import sparsify
from benchmarks.attention_patterns import HEADS
from benchmarks.checkpoints import SMOLLM2
from benchmarks.editorials import REVIEWS, rated, token_windows
from benchmarks.needles import ANSWER, Needle, needles
from benchmarks.records import Record, Records, add_output, table
from sparsify.bench import threads
from sparsify.calibration import Calibration
from sparsify.generation import CompiledCausalLM
from sparsify.generation.paged_cache import PagedCache
from sparsify.patterns import (
    Dilated,
    Lines,
    Pattern,
    PowersOfTwo,
    Sharded,
    Strided,
    WindowSinks,
)

BLOCK = 64
"""Queries and keys of a block of a static pattern."""
KEYS = 16
"""Of a block that is selected."""
DYNAMIC: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "pooled_blocks": lambda _: sparsify.PooledBlocks,
    "flex_prefill": lambda _: sparsify.FlexPrefill,
    "vertical_slash": lambda _: sparsify.VerticalSlash,
    "minference": lambda tokenizer: partial(sparsify.MInference, calibration=facts(tokenizer)),
    "seer_attention": lambda tokenizer: partial(
        sparsify.SeerAttention, calibration=facts(tokenizer, _TRAINED)
    ),
}
"""Recipes of prompts by their densities; of a tokenizer, as some are calibrated on texts."""
STATIC: dict[str, Callable[[int], Pattern]] = {
    "window_sinks": lambda size: WindowSinks(size, 1),
    "strided": lambda size: Strided(size, 8),
    "dilated": lambda size: Dilated(4, size),
    "powers_of_two": lambda size: PowersOfTwo(size, 1),
    "lines": lambda size: Lines((0, 4, 8), tuple(range(size))),
    "sharded": lambda size: Sharded(8, size),
}
"""Patterns by a size, the more the denser."""
DECODE: dict[str, Callable[[argparse.Namespace, Calibration], Any]] = {
    "quest": lambda given, _: sparsify.Quest(given.budget, bound_keys=given.bound_keys),
    "double_sparsity": lambda given, texts: sparsify.DoubleSparsity(
        given.budget, calibration=texts
    ),
    "tidal_decode": lambda given, _: sparsify.TidalDecode(
        given.budget, selecting=tuple(given.selecting)
    ),
    "streaming_window": lambda given, _: sparsify.StreamingWindow(given.budget),
}
_CALIBRATION = 512
"""Tokens of film reviews that recipes are calibrated on."""
_REVIEWS = 100
_SEARCHED = (1000, 2000)
"""Tokens of the texts that patterns of heads are searched on, three of each."""
_TRAINED = (1000, 2000, 4000)
"""Tokens of the texts that gates are trained on, three of each."""
_OTHER = "The lucky number of the old sailor is"
"""What texts for calibration tell and ask: nothing that is looked for in the end."""


def fitting(make: Callable[[int], Pattern], blocks: int, density: float) -> Pattern:
    """The densest of a kind that reads at most that share of the blocks that causality shows, the
    sparsest where all read more."""
    found = make(1)
    for size in range(2, blocks):
        pattern = make(size)
        if share_of(pattern, blocks) > density:
            break
        found = pattern
    return found


def share_of(pattern: Pattern, blocks: int) -> float:
    """What a pattern reads of the blocks that causality shows, in the mean over all heads."""
    kept = pattern.marks(blocks, HEADS).tril().sum((1, 2)).float().mean()
    return float(kept) / (blocks * (blocks + 1) / 2)


def answer(lm: CompiledCausalLM, cache: PagedCache, logits: torch.Tensor) -> torch.Tensor:
    """Greedy tokens behind what the cache holds."""
    said = [logits.argmax(-1)]
    while len(said) < ANSWER:
        said.append(lm(said[-1][:, None], cache).argmax(-1))
    return torch.cat(said)


def blocks_of(name: str, density: float, keys: int, tokenizer: Any) -> Any:
    """A recipe of prompts that always reads the first block and the one before a query's own."""
    return DYNAMIC[name](tokenizer)(density, keys=keys, sinks=keys, recent=keys)


def reviews(tokenizer: Any) -> Calibration:
    """Film reviews, for what is calibrated: they are no editorials."""
    text = " ".join(text for _, _, text in rated(REVIEWS)[:_REVIEWS])
    return Calibration([tokenizer(text).input_ids[:_CALIBRATION]])


def facts(tokenizer: Any, lengths: Sequence[int] = _SEARCHED) -> Calibration:
    """Film reviews with a needle and its question, both unlike those that are looked for: patterns
    of heads are searched on them, as the paper's are on keys and values to retrieve, and gates are
    trained."""
    found = needles(tokenizer, lengths, 0, _OTHER, REVIEWS)
    return Calibration([needle.prompt[0] for needle in found])


def compiled(model: Any, recipe: Any) -> CompiledCausalLM:
    options = {} if recipe is None else {"recipe": recipe}
    lm = sparsify.compile(model, num_threads=1, **options)
    assert isinstance(lm, CompiledCausalLM)
    return lm


def hidden(given: argparse.Namespace, tokenizer: Any) -> Iterator[Needle]:
    for seed in given.seeds:
        yield from needles(tokenizer, given.lengths, seed)


def record(part: str, method: str, hits: list[tuple[Needle, bool]], **more: Any) -> Record:
    by_length: dict[str, int] = {}
    for needle, hit in hits:
        by_length[str(needle.length)] = by_length.get(str(needle.length), 0) + hit
    found = sum(hit for _, hit in hits)
    return {"part": part, "method": method, "found": found, "of": len(hits), **by_length, **more}


def prefill(
    given: argparse.Namespace, names: list[str], model: Any, tokenizer: Any
) -> Iterator[Record]:
    every = list(hidden(given, tokenizer))
    density = given.density / 100
    for name in names:
        hits, shares, before = [], [], None
        recipe: Any = None
        if name in DYNAMIC:
            recipe = blocks_of(name, density, given.keys, tokenizer)
        for needle in every:
            if name in STATIC:
                blocks = -(-needle.prompt.shape[1] // BLOCK)
                pattern = fitting(STATIC[name], blocks, density)
                shares.append(share_of(pattern, blocks))
                recipe = sparsify.PatternAttention(pattern)
            if not hits or recipe != before:
                lm, before = compiled(model, recipe), recipe
            cache = lm.new_cache(1, needle.prompt.shape[1] + ANSWER)
            said = answer(lm, cache, lm(needle.prompt, cache))
            hits.append((needle, needle.found(tokenizer, said)))
        read = {"read": sum(shares) / len(shares)} if shares else {}
        yield record("prefill", name, hits, **read)


def decode(
    given: argparse.Namespace, names: list[str], model: Any, tokenizer: Any
) -> Iterator[Record]:
    longest = max(given.lengths)
    windows = token_windows(tokenizer, longest)
    texts = reviews(tokenizer)
    # Its prompts leave what every other method reads too.
    reader = compiled(model, DECODE["quest"](given, texts))
    held = []
    for needle in hidden(given, tokenizer):
        cache = reader.new_cache(1, needle.prompt.shape[1] + ANSWER)
        reader(needle.text, cache)
        held.append((needle, cache, cache.lengths))
    unseen = windows[-1:]
    before = longest - given.steps
    text = reader.new_cache(1, longest)
    reader(unseen[:, :before], text)
    start = text.lengths
    for name in names:
        lm = compiled(model, None if name == "dense" else DECODE[name](given, texts))
        hits = []
        for needle, cache, lengths in held:
            cache.lengths = lengths
            for token in needle.question.split(1, dim=1):
                logits = lm(token, cache)
            hits.append((needle, needle.found(tokenizer, answer(lm, cache, logits))))
        text.lengths, total = start, 0.0
        for place in range(before, longest - 1):
            logits = lm(unseen[:, place : place + 1], text)
            total += float(torch.nn.functional.cross_entropy(logits, unseen[:, place + 1]))
        yield record("decode", name, hits, perplexity=math.exp(total / (given.steps - 1)))


PARTS = {"prefill": (prefill, (*DYNAMIC, *STATIC)), "decode": (decode, tuple(DECODE))}
"""What measures the methods of a part, and their names."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--methods", nargs="+", help="only these, of all parts")
    parser.add_argument("--lengths", type=int, nargs="+", default=(1000, 2000, 4000))
    parser.add_argument("--seeds", type=int, nargs="+", default=(1,), help="nine needles for each")
    parser.add_argument("--density", type=int, default=25, help="percent that prompts read")
    parser.add_argument("--keys", type=int, default=KEYS, help="of a block that is selected")
    parser.add_argument("--budget", type=int, default=512, help="tokens that a step reads")
    parser.add_argument("--bound-keys", type=int, default=4, help="keys that share bounds")
    parser.add_argument("--selecting", type=int, nargs="+", default=(8, 18), help="layers")
    parser.add_argument("--steps", type=int, default=512, help="of which decode's perplexity is")
    add_output(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tokenizer, model = SMOLLM2.tokenizer(), SMOLLM2.load()
    records = Records.of(given)
    with threads(1), torch.no_grad():
        for part in given.part:
            measure, methods = PARTS[part]
            found = records.written(part)
            names = records.missing(part, ("dense", *methods), given.methods)
            for cell in measure(given, names, model, tokenizer) if names else ():
                records.add(cell)
                found.append(cell)
            if found:
                Console(width=120).print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
