"""SmolLM2-135M with gated activations: perplexity on editorials, and the speed of decoding.

    python -m benchmarks.gating_quality
    python -m benchmarks.gating_quality --rules cats wina-gates --sparsity 50 --decode

Each rule is calibrated on some windows of text and measured on others. Perplexity is that of the
rewritten program on whole windows, so every token is gated. `skipped` is the share of all
multiplications of the layers' linears that are not computed; rules that gate the inputs of every
linear skip more of them at one sparsity than rules that gate gated networks, so compare within
those. With ``--errors`` each place has as much sparsity as keeps its error. With ``--decode`` the
same recipe is compiled, and single tokens of a text that it was not calibrated on, those after the
first ``--context``, take turns with the dense model: the ratio is the dense time over the gated
one, above 1 when gating is faster.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sparsify
from benchmarks.checkpoints import SMOLLM2
from benchmarks.editorials import token_windows
from benchmarks.spmv import Turns
from sparsify import ops
from sparsify.bench import Machine, interleave, ratio, threads
from sparsify.calibration import Calibration
from sparsify.contracts import PassContext
from sparsify.frontend.torch import import_torch
from sparsify.generation import CompiledCausalLM
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.gating import Gating
from sparsify.passes.graph import arguments
from sparsify.passes.sites import linear_site
from sparsify.program import Program

RULES: dict[str, Callable[..., Gating]] = {
    "cats": sparsify.Cats,
    "chess": sparsify.Chess,
    "wina-gates": partial(sparsify.Wina, at="gates"),
    "top-k-gates": partial(sparsify.TopK, at="gates"),
    "spark": sparsify.SparkTopK,
    "teal": sparsify.Teal,
    "wina": sparsify.Wina,
    "wina-k": partial(sparsify.Wina, per_token=True),
    "top-k": sparsify.TopK,
    "r-sparse": sparsify.RSparse,
}


def perplexity(program: Program, windows: torch.Tensor) -> float:
    run = program.exported.module()
    total = 0.0
    with torch.no_grad():
        for window in windows:
            logits = run(window[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(total / (len(windows) * (windows.shape[1] - 1)))


def multiplications(program: Program) -> float:
    """Those of the layers' linears for one token, as far as they are expected to be computed."""
    total = 0.0
    for node in program.graph.nodes:
        if node.target in ops.LINEARS and linear_site(program, node).name != "lm_head":
            options = arguments(node)
            size = options["out_features"] * options["in_features"]
            total += size * options.get("active", 1.0)
    return total


def cells(given: argparse.Namespace, model: Any) -> Iterator[dict[str, Any]]:
    windows = token_windows(SMOLLM2.tokenizer(), given.length)
    known, unseen = windows[: given.calibration], windows[-given.windows :]
    assert len(known) + len(unseen) <= len(windows)
    model.config.use_cache = False
    imported = import_torch(model, (unseen[:1],), dynamic_shapes=None)
    model.config.use_cache = True
    portable = run_pipeline(imported, PORTABLE).programs
    dense = portable["forward"]
    before = perplexity(dense, unseen)
    yield {"rule": "dense", "sparsity": 0, "perplexity": before, "ratio": 1.0, "skipped": 0.0}
    decode = Decode(given, model, unseen[:1]) if given.decode else None
    texts = Calibration([(window[None],) for window in known])
    for rule in given.rules:
        for sparsity, options in wanted(given):
            recipe = RULES[rule](sparsity / 100, texts, **options)
            result = recipe.run(portable, PassContext())
            gated = result.programs["forward"]
            found = perplexity(gated, unseen)
            errors = [d.error for d in result.decisions if d.error is not None]
            yield {
                "rule": rule,
                "sparsity": sparsity,
                "budget_error": options.get("budget_error"),
                "perplexity": found,
                "ratio": found / before,
                "skipped": 1 - multiplications(gated) / multiplications(dense),
                "error": sum(errors) / len(errors),
                "decode": None if decode is None else decode.measure(recipe, known),
            }


def wanted(given: argparse.Namespace) -> Iterator[tuple[int, dict[str, Any]]]:
    """Sparsities, the same everywhere or, of ``--errors``, as large as a place's error allows."""
    if given.errors:
        yield from ((90, {"budget_error": error / 100, "fit": True}) for error in given.errors)
    else:
        yield from ((sparsity, {}) for sparsity in given.sparsity)


class Decode:
    """Single tokens after a context, dense and gated in turns, on one thread or more."""

    def __init__(self, given: argparse.Namespace, model: Any, text: torch.Tensor) -> None:
        self.given, self.model, self.text = given, model, text
        self.dense = sparsify.compile(model, num_threads=given.threads)

    def steps(self, lm: CompiledCausalLM) -> Turns:
        """One step after another through the text, and again."""
        context, length = self.given.context, self.text.shape[1]
        cache = lm.new_cache(1, length)
        lm(self.text[:, :context], cache)
        start = cache.lengths

        def step(at: int) -> torch.Tensor:
            cache.lengths = start + (at - context)
            return lm(self.text[:, at : at + 1], cache)

        return Turns([partial(step, at) for at in range(context, length)])

    def measure(self, recipe: Gating, known: torch.Tensor) -> dict[str, Any]:
        recipe = replace(recipe, calibration=Calibration(list(known)))
        lm = sparsify.compile(self.model, recipe=recipe, num_threads=self.given.threads)
        calls = {"dense": self.steps(self.dense), "gated": self.steps(lm)}
        with threads(self.given.threads):
            samples = interleave(calls, self.given.rounds, self.given.seconds)
        return {
            "threads": self.given.threads,
            "tokens_per_second": 1 / samples["gated"].median,
            "dense_tokens_per_second": 1 / samples["dense"].median,
            "speedup": ratio(samples["gated"], samples["dense"]).inverse.to_dict(),
            "weight_bytes": lm.nbytes,
            "dense_weight_bytes": self.dense.nbytes,
        }


def table(found: list[dict[str, Any]]) -> Table:
    made = Table(title=f"perplexity, dense {found[0]['perplexity']:.2f}", title_justify="left")
    for name in ("rule", "sparsity", "perplexity", "x dense", "skipped", "mean error"):
        made.add_column(name, justify="right")
    timed = any(cell.get("decode") for cell in found)
    for name in ("tokens/s", "x dense speed", "x dense bytes") if timed else ():
        made.add_column(name, justify="right")
    for cell in found[1:]:
        row = [
            cell["rule"],
            f"{cell['sparsity']}%"
            if cell["budget_error"] is None
            else f"error {cell['budget_error']:.0%}",
            f"{cell['perplexity']:.2f}",
            f"{cell['ratio']:.3f}",
            f"{cell['skipped']:.0%}",
            f"{cell['error']:.1%}",
        ]
        if timed:
            d = cell["decode"]
            speed = d["speedup"]
            row += [
                f"{d['tokens_per_second']:.1f}",
                f"{speed['median']:.2f} [{speed['low']:.2f}, {speed['high']:.2f}]",
                f"{d['weight_bytes'] / d['dense_weight_bytes']:.2f}",
            ]
        made.add_row(*row)
    return made


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--sparsity", type=int, nargs="+", default=(30, 50, 70), help="percent")
    parser.add_argument(
        "--errors",
        type=float,
        nargs="+",
        help="instead of --sparsity: percent of relative error that each place may have, at a "
        "sparsity of at most 90%%",
    )
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--calibration", type=int, default=8, help="windows to calibrate on")
    parser.add_argument("--windows", type=int, default=32, help="windows to measure on")
    parser.add_argument("--decode", action="store_true", help="also compile, and time decoding")
    parser.add_argument("--context", type=int, default=127, help="tokens before the decoded one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one turn")
    parser.add_argument("--json", action="store_true", help="one record a line")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    machine = Machine.here()
    console = Console(quiet=given.json, highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(f"SmolLM2-135M, fp32, {machine.line(given.threads)}")
    found = []
    for cell in cells(given, SMOLLM2.load()):
        if given.json:
            print(json.dumps({**cell, "machine": machine.to_dict()}, sort_keys=True), flush=True)
        found.append(cell)
    console.print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
