"""Attention over a selection of the paged cache against all of it, the selection included.

    python -m benchmarks.attention_selection --threads 1
    python -m benchmarks.attention_selection --part decode --context 4096 --budget 512

Sizes are SmolLM2's, 9 query heads and 3 key heads of 64 features. Ratios are times over those of
our dense attention in the same run, below 1 is faster. Parts:

- ``decode``: one token's attention in all 30 layers, whose cache does not fit the caches.
- ``prefill``: one layer's causal attention of a prompt that comes at once.

The error is that of the kernel's result against the eager reference of the same operators on the
same cache, over the largest value.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import sparsify
from benchmarks.cells import Cell, interval, publish
from sparsify import ops
from sparsify.bench import interleave, ratio, threads
from sparsify.ops import PAGE, CacheShape
from sparsify.selectors import PATTERNS

PARTS = ("decode", "prefill")
HEADS, SHAPE = 9, CacheShape(30, 3, 64)
SCALE = 0.125
PAGES: dict[str, tuple[str | None, int]] = {
    "dense": (None, 1),
    "bounds of 16 keys": ("page_bounds", 1),
    "bounds of 8": ("page_bounds", 2),
    "bounds of 4": ("page_bounds", 4),
    "channels": ("channels", 1),
    "exact": ("exact", 1),
    "latest": ("latest", 1),
}
"""Selectors of pages, and in how many parts a page has bounds."""
BLOCKS = ("pooled", "query_aware mass", "vertical_slash", "block_gate", "head_patterns")
CHANNELS, MASS, QUERIES, KEYS = 16, 0.95, 64, 16
_CHECKED = 1024
"""Tokens of a prompt on which results are compared: the reference is slow."""


@dataclass(frozen=True)
class Cache:
    """One sequence, its pages in no order."""

    keys: torch.Tensor
    values: torch.Tensor
    pages: torch.Tensor

    def bounds(self, parts: int) -> torch.Tensor:
        """Of every page, in so many parts."""
        return torch.stack(self.keys.unflatten(-1, (parts, -1)).aminmax(dim=-1), 3)

    @classmethod
    def random(cls, layers: int, length: int) -> Cache:
        shape = CacheShape(layers, SHAPE.kv_heads, SHAPE.head_dim)
        count = -(-length // PAGE)
        keys, values = (part.normal_() for part in shape.zeros(count))
        pages = torch.randperm(count).int()[None]
        return cls(keys, values, pages)


class Decode(torch.nn.Module):
    """One token's attention in every layer, over what a selector selects, or everything."""

    def __init__(self, selector: str | None, budget: int) -> None:
        super().__init__()
        self.selector, self.budget = selector, budget
        chosen = torch.stack([torch.randperm(SHAPE.head_dim) for _ in range(SHAPE.kv_heads)])
        self.register_buffer("channels", chosen[:, :CHANNELS].int().contiguous())

    def forward(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        pages: torch.Tensor,
        lengths: torch.Tensor,
        counts: torch.Tensor,
        bounds: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros_like(query)
        for layer in range(SHAPE.layers):
            place, selected = (layer, HEADS, 0), None
            if self.selector is not None:
                tensors = {"page_bounds": [bounds], "channels": [self.channels]}
                selected = ops.select_pages.overload(
                    query, keys, tensors.get(self.selector, []), pages, lengths, counts, *place,
                    self.selector, self.budget // PAGE,
                )  # fmt: skip
            total = total + ops.paged_attention.overload(
                query, keys, values, pages, lengths, counts, *place, SCALE, 0, 0.0, [], selected
            )
        return total


class Prefill(torch.nn.Module):
    """A prompt's attention in one layer."""

    def __init__(self, selector: str | None, density: float, keys: int) -> None:
        super().__init__()
        self.selector, self.density, self.block = selector, density, (QUERIES, keys // PAGE)
        gate = torch.eye(SHAPE.head_dim) + 0.1 * torch.randn(SHAPE.head_dim, SHAPE.head_dim)
        self.register_buffer("gates", gate.expand(HEADS, -1, -1).contiguous())
        # As many heads of each pattern.
        self.register_buffer("patterns", torch.arange(HEADS).int() % len(PATTERNS))

    def forward(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        pages: torch.Tensor,
        lengths: torch.Tensor,
        counts: torch.Tensor,
    ) -> torch.Tensor:
        place, selected = (0, HEADS, 0, SCALE), None
        if self.selector is not None:
            name, _, mass = self.selector.partition(" ")
            tensors = {"block_gate": [self.gates], "head_patterns": [self.patterns]}
            selected = ops.select_blocks.overload(
                query, keys, tensors.get(name, []), pages, lengths, counts,
                *place, name, self.block, self.density, MASS if mass else 0.0,
            )  # fmt: skip
        y: torch.Tensor = ops.paged_attention.overload(
            query, keys, values, pages, lengths, counts, *place, 0, 0.0, [], selected, self.block
        )
        return y


def compiled(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], count: int) -> Any:
    return sparsify.compile(
        module.eval(), inputs, num_threads=count, dynamic_shapes=None, strict=True
    )


def inputs_of(cache: Cache, length: int, new: int) -> tuple[torch.Tensor, ...]:
    query = torch.randn(1, new, HEADS * SHAPE.head_dim)
    return (
        *(query, cache.keys, cache.values, cache.pages),
        *(torch.tensor([length]), torch.tensor([new])),
    )


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def decode(count: int, given: argparse.Namespace) -> list[Cell]:
    cache = Cache.random(SHAPE.layers, given.context)
    errors, calls = {}, {}
    for name, (selector, parts) in PAGES.items():
        module = Decode(selector, given.budget)
        inputs = (*inputs_of(cache, given.context, 1), cache.bounds(parts))
        run = compiled(module, inputs, count)
        calls[name] = lambda run=run, inputs=inputs: run(*inputs)
        errors[name] = error_of(run(*inputs), module(*inputs))
    label = {"tokens": given.context, "share": given.budget / given.context}
    return cells("decode", calls, errors, count, label, given)


def prefill(count: int, given: argparse.Namespace) -> list[Cell]:
    cache = Cache.random(1, given.length)
    inputs = inputs_of(cache, given.length, given.length)
    short = Cache.random(1, _CHECKED)
    checked = inputs_of(short, _CHECKED, _CHECKED)
    modules = {name: Prefill(name, given.density / 100, given.keys) for name in BLOCKS}
    modules["dense"] = Prefill(None, 1.0, KEYS)
    errors, calls = {}, {}
    for name, module in modules.items():
        run = compiled(module, inputs, count)
        calls[name] = lambda run=run: run(*inputs)
        expected = module(*checked)
        errors[name] = error_of(compiled(module, checked, count)(*checked), expected)
    label = {"tokens": given.length, "share": given.density / 100}
    return cells("prefill", calls, errors, count, label, given)


def cells(
    part: str,
    calls: dict[str, Callable[[], Any]],
    errors: dict[str, float],
    count: int,
    label: dict[str, float],
    given: argparse.Namespace,
) -> list[Cell]:
    samples = interleave(calls, given.rounds, given.seconds)
    return [
        {
            "part": part,
            "method": name,
            "threads": count,
            **label,
            "ms": samples[name].median * 1e3,
            "dense_ms": samples["dense"].median * 1e3,
            "of_dense": ratio(samples[name], samples["dense"]).to_dict(),
            "max_rel_error": errors[name],
        }
        for name in calls
    ]


def groups(given: argparse.Namespace) -> Iterator[list[Cell]]:
    parts = {"decode": decode, "prefill": prefill}
    for count in sorted(given.threads, reverse=True):
        for part in given.part:
            torch.manual_seed(0)
            with threads(count), torch.no_grad():
                yield parts[part](count, given)


def table(found: Sequence[Cell]) -> Table:
    first = found[0]
    made = Table(
        title=f"{first['part']}, {first['tokens']} tokens, {first['share']:.0%} read, threads "
        f"{first['threads']}",
        title_justify="left",
    )
    for name in ("method", "ms", "of dense", "error"):
        made.add_column(name, justify="left" if name == "method" else "right")
    for cell in found:
        made.add_row(
            cell["method"],
            f"{cell['ms']:.2f}",
            interval(cell["of_dense"]),
            f"{cell['max_rel_error']:.0e}",
        )
    return made


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--context", type=int, default=4096, help="tokens before the decoded one")
    parser.add_argument("--budget", type=int, default=512, help="tokens that decode reads")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--density", type=int, default=25, help="percent that prefill reads")
    parser.add_argument("--keys", type=int, default=KEYS, help="of a block that prefill selects")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of one turn")
    parser.add_argument("--json", action="store_true", help="one record a line, no tables")
    parser.add_argument("--output", type=Path, help="also write the records to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when an error exceeds what we promise."""
    given = parse(arguments)
    return publish("attention over selections", given, groups(given), table, lambda _: ())


if __name__ == "__main__":
    sys.exit(main())
