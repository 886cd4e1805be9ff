"""SmolLM2-135M with static patterns of attention: perplexity and errors against density.

    python -m benchmarks.attention_patterns
    python -m benchmarks.attention_patterns --length 4096 --windows 2

Each pattern is measured on some windows of editorials, as `PatternAttention` measures it, and its
perplexity is that of the rewritten program on others. `density` is the share of pairs of query and
key that are computed, of those that causality shows; `mass` the share of attention's weights on
them; `error` the change of a head's output over its norm, the mean and the largest of all heads.
The mixture chooses a pattern for each head, from all those above that are the same for all heads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.checkpoints import SMOLLM2
from benchmarks.editorials import token_windows
from benchmarks.gating_quality import perplexity
from sparsify.calibration import Calibration
from sparsify.contracts import Pass, PassContext
from sparsify.frontend.torch import import_torch
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.attention_mixture import AttentionMixture
from sparsify.passes.pattern_attention import PatternAttention
from sparsify.patterns import (
    Dilated,
    Lines,
    Pattern,
    PowersOfTwo,
    Sharded,
    Strided,
    WindowSinks,
)

PATTERNS: tuple[Pattern, ...] = (
    WindowSinks(1, 1),
    WindowSinks(3, 1),
    WindowSinks(7, 1),
    Strided(1, 8),
    Strided(2, 4),
    Dilated(2, 8),
    Dilated(4, 8),
    PowersOfTwo(1, 1),
    PowersOfTwo(3, 1),
    Lines((0, 1), (0, 1, 2)),
    Lines((0, 4, 8), (0, 1, 2, 3, 16)),
    Sharded(4, 1),
    Sharded(8, 2),
)
DENSITIES = (0.3, 0.5)
HEADS = 9
"""Query heads of a layer of the model."""


def recipes(data: Calibration, block: int) -> Iterator[tuple[str, Pass]]:
    for pattern in PATTERNS:
        yield str(pattern), PatternAttention(pattern, block=block, calibration=data)
    for density in DENSITIES:
        alike = tuple(pattern for pattern in PATTERNS if not pattern.per_head)
        yield f"mixture({density})", AttentionMixture(alike, density, data, block=block)


def cells(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    windows = token_windows(SMOLLM2.tokenizer(), given.length)
    known, unseen = windows[: given.calibration], windows[-given.windows :]
    assert len(known) + len(unseen) <= len(windows)
    model = SMOLLM2.load()
    model.config.use_cache = False
    imported = import_torch(model, (unseen[:1],), dynamic_shapes=None)
    portable = run_pipeline(imported, PORTABLE).programs
    before = perplexity(portable["forward"], unseen)
    yield {"recipe": "dense", "perplexity": before, "ratio": 1.0}
    data = Calibration([(window[None],) for window in known])
    for name, recipe in recipes(data, given.block):
        result = recipe.run(portable, PassContext())
        heads = [d for d in result.decisions if d.operator == "attention head"]
        dense = [d for d in result.decisions if d.verdict == "skipped"]
        count = len(heads) + len(dense) * HEADS
        found = perplexity(result.programs["forward"], unseen)
        yield {
            "recipe": name,
            "density": (sum(d.density or 0.0 for d in heads) + count - len(heads)) / count,
            "mass": (sum(d.mass or 0.0 for d in heads) + count - len(heads)) / count,
            "error": sum(d.error or 0.0 for d in heads) / count,
            "largest_error": max(d.error or 0.0 for d in heads),
            "perplexity": found,
            "ratio": found / before,
        }


def table(found: list[dict[str, Any]]) -> Table:
    made = Table(title=f"perplexity, dense {found[0]['perplexity']:.2f}", title_justify="left")
    for name in ("recipe", "density", "mass", "error", "largest", "perplexity", "x dense"):
        made.add_column(name, justify="left" if name == "recipe" else "right")
    for cell in found[1:]:
        made.add_row(
            cell["recipe"],
            f"{cell['density']:.1%}",
            f"{cell['mass']:.1%}",
            f"{cell['error']:.1%}",
            f"{cell['largest_error']:.1%}",
            f"{cell['perplexity']:.2f}",
            f"{cell['ratio']:.3f}",
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=1, help="on which perplexity is measured")
    parser.add_argument("--calibration", type=int, default=1, help="windows that recipes see")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--json", help="write all cells to this file")
    given = parser.parse_args()
    found = []
    for cell in cells(given):
        found.append(cell)
        print(json.dumps(cell), flush=True)
    Console(width=120).print(table(found))
    if given.json:
        with open(given.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
