"""What sparse attention over its cache costs SmolLM2-135M: perplexity against density.

    python -m benchmarks.attention_perplexity
    python -m benchmarks.attention_perplexity --methods vertical_slash --densities 25

Perplexity is that of a text that comes at once, for each method at ``--densities``. Programs run
eagerly, which `tests/passes` compare with compiled ones. `density` is the share of visible blocks
that are listed, as it was counted; a static pattern has that of its own.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from rich.console import Console
from torch import fx

import sparsify
from benchmarks.attention_patterns import PATTERNS
from benchmarks.attention_quality import BLOCK, DYNAMIC, KEYS, blocks_of
from benchmarks.checkpoints import SMOLLM2
from benchmarks.editorials import token_windows
from benchmarks.records import Record, Records, add_output, table
from sparsify import ops
from sparsify.bench import threads
from sparsify.calibration import Calibration
from sparsify.contracts import PassContext
from sparsify.frontend.causal_lm import import_causal_lm
from sparsify.ops import PAGE
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.graph import arguments, shape_of
from sparsify.program import Program

PART = "perplexity"

_AT_ONCE = 256
"""Rows of logits that are in memory together."""


def perplexities(
    given: argparse.Namespace, records: Records, model: Any, tokenizer: Any
) -> Iterator[Record]:
    text = token_windows(tokenizer, given.window)[-1]
    programs = run_pipeline(import_causal_lm(model), PORTABLE).programs
    makers: dict[str, Callable[[], Any]] = {"dense": lambda: None}
    for kind, density in product(DYNAMIC, given.densities):
        makers[f"{kind} {density}%"] = partial(
            blocks_of, kind, density / 100, given.keys, tokenizer
        )
    for pattern in PATTERNS:
        makers[f"patterns {pattern}"] = partial(sparsify.PatternAttention, pattern, block=BLOCK)
    for name in records.missing(PART, makers, given.methods):
        recipe, found = makers[name](), programs["prefill"]
        if recipe is not None:
            found = recipe.run(programs, PassContext()).programs["prefill"]
        yield {"part": PART, "method": name, **measured(found, text)}


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


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", help="only these; also patterns")
    parser.add_argument("--keys", type=int, default=KEYS, help="of a block that is selected")
    parser.add_argument("--densities", type=int, nargs="+", default=(10, 25, 50))
    parser.add_argument("--window", type=int, default=2048, help="tokens of the text")
    add_output(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tokenizer, model = SMOLLM2.tokenizer(), SMOLLM2.load()
    records = Records.of(given)
    found = records.written(PART)
    with threads(1), torch.no_grad():
        for cell in perplexities(given, records, model, tokenizer):
            records.add(cell)
            found.append(cell)
    Console(width=120).print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
