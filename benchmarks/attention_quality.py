"""What sparse attention costs SmolLM2-135M: needles in editorials, perplexity against density.

    python -m benchmarks.attention_quality
    python -m benchmarks.attention_quality --part prefill --methods pooled_blocks --lengths 1000

Parts:

- ``prefill``: prompts of a text with a needle and its question are read by recipes that select
  blocks at ``--density`` percent; the answer is generated with all of the cache.
- ``decode``: the text is read whole; the question and the answer go token by token, over at most
  ``--budget`` tokens of the cache, as Quest is measured by its authors. Perplexity is that of the
  last ``--steps`` tokens of a text of the greatest length, which go the same way.
- ``perplexity``: of a text that comes at once, for each method at ``--densities``. Programs run
  eagerly there, which `tests/passes` compare with compiled ones. `density` is the share of visible
  blocks that are listed, as it was counted; a static pattern has that of its own.

A needle is found when the answer begins with its number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx

import sparsify
from benchmarks.attention_patterns import PATTERNS
from benchmarks.checkpoints import SMOLLM2
from benchmarks.editorials import rated, token_windows
from benchmarks.needles import ANSWER, Needle, needles
from sparsify import ops
from sparsify.bench import threads
from sparsify.calibration import Calibration
from sparsify.contracts import PassContext
from sparsify.frontend.causal_lm import import_causal_lm
from sparsify.generation import CompiledCausalLM
from sparsify.generation.paged_cache import PagedCache
from sparsify.ops import PAGE
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.graph import arguments, shape_of
from sparsify.patterns import Pattern, Strided, WindowSinks
from sparsify.program import Program

PARTS = ("prefill", "decode", "perplexity")
BLOCK = 64
DYNAMIC: dict[str, Callable[..., Any]] = {
    "pooled_blocks": sparsify.PooledBlocks,
    "flex_prefill": sparsify.FlexPrefill,
    "vertical_slash": sparsify.VerticalSlash,
}
"""Recipes of prompts by their densities."""
STATIC: dict[str, Callable[[int], Pattern]] = {
    "window_sinks": lambda size: WindowSinks(size, 1),
    "strided": lambda size: Strided(size, 8),
}
"""Patterns by a size, the more the denser."""
DECODE: dict[str, Callable[[int, Calibration], Any]] = {
    "quest": lambda budget, _: sparsify.Quest(budget),
    "double_sparsity": lambda budget, texts: sparsify.DoubleSparsity(budget, calibration=texts),
    "tidal_decode": lambda budget, _: sparsify.TidalDecode(budget),
    "streaming_window": lambda budget, _: sparsify.StreamingWindow(budget),
}
_CALIBRATION = 512
"""Tokens of film reviews that `DoubleSparsity` is calibrated on, which are no editorials."""
_REVIEWS = 100
_AT_ONCE = 256
"""Rows of logits that are in memory together."""


def fitting(make: Callable[[int], Pattern], blocks: int, density: float) -> Pattern:
    """The densest of a kind that reads at most that share of the blocks that causality shows."""
    visible = blocks * (blocks + 1) / 2
    found = make(1)
    for size in range(2, blocks):
        pattern = make(size)
        if float(pattern.marks(blocks, 1).tril().sum()) / visible > density:
            break
        found = pattern
    return found


def answer(lm: CompiledCausalLM, cache: PagedCache, logits: torch.Tensor) -> torch.Tensor:
    """Greedy tokens behind what the cache holds."""
    said = [logits.argmax(-1)]
    while len(said) < ANSWER:
        said.append(lm(said[-1][:, None], cache).argmax(-1))
    return torch.cat(said)


def blocks_of(name: str, density: float, keys: int) -> Any:
    """A recipe of prompts that always reads the first block and the one before a query's own."""
    return DYNAMIC[name](density, keys=keys, sinks=keys, recent=keys)


def compiled(model: Any, recipe: Any) -> CompiledCausalLM:
    options = {} if recipe is None else {"recipe": recipe}
    lm = sparsify.compile(model, num_threads=1, **options)
    assert isinstance(lm, CompiledCausalLM)
    return lm


def hidden(given: argparse.Namespace, tokenizer: Any) -> Iterator[Needle]:
    for seed in given.seeds:
        yield from needles(tokenizer, given.lengths, seed)


def record(part: str, method: str, hits: list[tuple[Needle, bool]], **more: Any) -> dict[str, Any]:
    by_length: dict[str, int] = {}
    for needle, hit in hits:
        by_length[str(needle.length)] = by_length.get(str(needle.length), 0) + hit
    found = sum(hit for _, hit in hits)
    return {"part": part, "method": method, "found": found, "of": len(hits), **by_length, **more}


def prefill(given: argparse.Namespace, model: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
    every = list(hidden(given, tokenizer))
    density = given.density / 100
    for name in wanted(given, "prefill", ("dense", *DYNAMIC, *STATIC)):
        hits, before = [], None
        for needle in every:
            recipe = None
            if name in DYNAMIC:
                recipe = blocks_of(name, density, given.keys)
            elif name in STATIC:
                blocks = -(-needle.prompt.shape[1] // BLOCK)
                recipe = sparsify.PatternAttention(fitting(STATIC[name], blocks, density))
            if not hits or recipe != before:
                lm, before = compiled(model, recipe), recipe
            cache = lm.new_cache(1, needle.prompt.shape[1] + ANSWER)
            said = answer(lm, cache, lm(needle.prompt, cache))
            hits.append((needle, needle.found(tokenizer, said)))
        yield record("prefill", name, hits)


def decode(given: argparse.Namespace, model: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
    names = wanted(given, "decode", ("dense", *DECODE))
    if not names:
        return
    longest = max(given.lengths)
    windows = token_windows(tokenizer, longest)
    reviews = " ".join(text for _, _, text in rated("movieReviewSnippets")[:_REVIEWS])
    texts = Calibration([tokenizer(reviews).input_ids[:_CALIBRATION]])
    # Its prompts leave what every other method reads too.
    reader = compiled(model, DECODE["quest"](given.budget, texts))
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
        lm = compiled(model, None if name == "dense" else DECODE[name](given.budget, texts))
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


def perplexity(given: argparse.Namespace, model: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
    text = token_windows(tokenizer, given.window)[-1]
    programs = run_pipeline(import_causal_lm(model), PORTABLE).programs
    recipes: list[tuple[str, Any]] = [("dense", None)]
    for name in DYNAMIC:
        recipes += [(f"{name} {d}%", blocks_of(name, d / 100, given.keys)) for d in given.densities]
    recipes += [(f"patterns {p}", sparsify.PatternAttention(p, block=BLOCK)) for p in PATTERNS]
    left = wanted(given, "perplexity", (name for name, _ in recipes))
    for name, recipe in recipes:
        if name not in left:
            continue
        if recipe is None:
            yield {"part": "perplexity", "method": name, **measured(programs["prefill"], text)}
            continue
        found = recipe.run(programs, PassContext()).programs["prefill"]
        yield {"part": "perplexity", "method": name, **measured(found, text)}


def measured(program: Program, text: torch.Tensor) -> dict[str, float]:
    """Perplexity and density of a text that a prefill program reads at once."""
    head, hidden = head_of(program)
    attentions = [n for n in program.graph.nodes if n.target == ops.paged_attention.overload]
    selections = {arguments(n)["selected"]: arguments(n)["block"] for n in attentions}
    selections.pop(None, None)
    states: list[torch.Tensor] = []
    shares: list[float] = []

    def watch(node: fx.Node, value: torch.Tensor) -> None:
        if node is hidden:
            states.append(value[0])
        if node in selections:
            share = float((value >= 0).sum()) / shown(value, selections[node], len(text))
            shares.append(share)

    Calibration([text]).run(program, watch, {hidden, *selections})
    (state,) = states
    total = 0.0
    for rows, following in zip(state[:-1].split(_AT_ONCE), text[1:].split(_AT_ONCE), strict=True):
        logits = rows @ head.mT
        total += float(torch.nn.functional.cross_entropy(logits, following, reduction="sum"))
    density = sum(shares) / len(shares) if shares else 1.0
    return {"perplexity": math.exp(total / (len(text) - 1)), "density": density}


def shown(lists: torch.Tensor, block: Sequence[int], tokens: int) -> int:
    """How many blocks causality shows, of lists ``[batch, heads, query blocks, key blocks]``."""
    ends = (torch.arange(1, lists.shape[2] + 1) * block[0]).clamp(max=tokens)
    return lists.shape[0] * lists.shape[1] * int((ends / (block[1] * PAGE)).ceil().sum())


def head_of(program: Program) -> tuple[torch.Tensor, fx.Node]:
    """The output layer of a prefill program, and the states of all tokens from which it reads."""
    linears = [n for n in program.graph.nodes if n.target == ops.sparse_linear.overload]
    options = arguments(linears[-1])
    weight = program.weight_of(options["weight"][0])
    assert weight is not None
    node = options["x"]
    while not (len(shape_of(node)) == 3 and isinstance(shape_of(node)[1], torch.SymInt)):
        node = node.all_input_nodes[0]
    return weight, node


def wanted(given: argparse.Namespace, part: str, names: Iterable[str]) -> list[str]:
    """What is asked for and not in the output yet."""
    asked = (n for n in names if given.methods is None or n.partition(" ")[0] in given.methods)
    done = {(cell["part"], cell["method"]) for cell in written(given)}
    return [name for name in asked if (part, name) not in done]


def written(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of an earlier run that was cut short."""
    if given.output is None or not given.output.exists():
        return []
    return [json.loads(line) for line in given.output.read_text().splitlines()]


def table(found: list[dict[str, Any]]) -> Table:
    made = Table(title=found[0]["part"], title_justify="left")
    columns = list(dict.fromkeys(name for cell in found for name in cell if name != "part"))
    for name in columns:
        made.add_column(name, justify="left" if name == "method" else "right")
    for cell in found:
        values = (cell.get(name, "") for name in columns)
        made.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    return made


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--methods", nargs="+", help="only these, of all parts; perplexity: also patterns"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=(1000, 2000, 4000))
    parser.add_argument("--seeds", type=int, nargs="+", default=(1,), help="nine needles for each")
    parser.add_argument("--density", type=int, default=25, help="percent that prompts read")
    parser.add_argument("--keys", type=int, default=BLOCK, help="of a block that is selected")
    parser.add_argument("--densities", type=int, nargs="+", default=(10, 25, 50))
    parser.add_argument("--budget", type=int, default=512, help="tokens that a step reads")
    parser.add_argument("--steps", type=int, default=512, help="of which decode's perplexity is")
    parser.add_argument("--window", type=int, default=2048, help="tokens of perplexity's text")
    parser.add_argument(
        "--output",
        type=Path,
        help="add the records to this file, and skip those that it has, of equal options",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tokenizer, model = SMOLLM2.tokenizer(), SMOLLM2.load()
    parts = {"prefill": prefill, "decode": decode, "perplexity": perplexity}
    with threads(1), torch.no_grad():
        for part in given.part:
            found = [cell for cell in written(given) if cell["part"] == part]
            for cell in parts[part](given, model, tokenizer):
                print(json.dumps(cell), flush=True)
                found.append(cell)
                if given.output is not None:
                    with given.output.open("a") as file:
                        file.write(json.dumps(cell) + "\n")
            if found:
                Console(width=120).print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
