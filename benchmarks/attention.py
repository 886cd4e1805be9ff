"""Attention, dense and in blocks, against torch, FlexAttention and ONNX Runtime.

    python -m benchmarks.attention --threads 1
    python -m benchmarks.attention --part blocks --lengths 2048

Ours is a compiled module on row-major activations: its conversions to lanes and back count. Peers
get what suits them, heads major for torch, rows for ONNX Runtime. All of a cell take turns in one
process. Parts:

- ``dense``: ratios are the fastest peer's time over ours, above 1 when we are faster.
- ``causal``, ``window`` (window and sinks, 4.6% of the blocks at 8192 tokens) and ``blocks`` (at
  random): ratios are times over our dense time, to be read beside the density.

The error is that of some queries against float64, over the largest value.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

import sparsify
from benchmarks.cells import Cell, interval, publish
from sparsify import ops
from sparsify.band import Band
from sparsify.bench import fastest, interleave, ratio, threads
from sparsify.bench.runtimes import onnxruntime_peer
from sparsify.block_mask import FULL, BlockMask

PARTS = ("dense", "causal", "window", "blocks")
LENGTHS, HEAD_DIMS, HEADS = (512, 1024, 2048, 4096, 8192), (32, 64, 128), 2
DENSITIES = (10, 25, 50)
WINDOW, SINKS = 257, 64
_CHECKED = 64
"""Queries whose results are compared with float64."""


@dataclass(frozen=True)
class Sizes:
    """One sequence, as rows and with its heads apart."""

    length: int
    head_dim: int

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def rows(self) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(self.length + self.head_dim)
        shape = (1, self.length, HEADS * self.head_dim)
        return tuple(torch.randn(shape, generator=generator) for _ in range(3))

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (HEADS, self.head_dim)).transpose(1, 2).contiguous()


class Attend(torch.nn.Module):
    """Our operator, over all keys, a band of them, or listed blocks."""

    def __init__(self, sizes: Sizes, band: Band, block: tuple[int, int] | None) -> None:
        super().__init__()
        self.sizes, self.band, self.block = sizes, band, block

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lists: torch.Tensor
    ) -> Any:
        sizes, band = self.sizes, self.band
        heads = (HEADS, HEADS, sizes.head_dim, [0, 0, 0], sizes.scale)
        if self.block is None:
            return ops.fused_attention.overload(
                q, k, v, None, *heads, band.causal, [], band.window, band.sinks
            )
        return ops.block_attention.overload(q, k, v, list(lists), None, *heads, self.block)


@dataclass(frozen=True)
class Candidate:
    """A call, and its result as ``[length, heads * head_dim]``."""

    call: Callable[[], Any]
    result: Callable[[], torch.Tensor]


def ours(sizes: Sizes, band: Band, blocks: BlockMask | None, count: int) -> Candidate:
    lists = tuple(blocks.tensors) if blocks else ()
    module = Attend(sizes, band, blocks.block if blocks else None)
    inputs = (*sizes.rows(), *lists)
    compiled = sparsify.compile(
        module.eval(), inputs, num_threads=count, dynamic_shapes=None, strict=True
    )
    return Candidate(lambda: compiled(*inputs), lambda: compiled(*inputs)[0])


def torch_dense(sizes: Sizes, causal: bool) -> Candidate:
    q, k, v = (sizes.split(x) for x in sizes.rows())

    def call() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return Candidate(call, lambda: call()[0].transpose(0, 1).flatten(1))


def flex(sizes: Sizes, blocks: BlockMask) -> Candidate | None:
    """FlexAttention of torch.compile, None where it does not run."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (sizes.split(x) for x in sizes.rows())
    mask, run = blocks.to_flex(), torch.compile(flex_attention, dynamic=False)

    def call() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = run(q, k, v, block_mask=mask)
        return found

    try:
        call()
    except Exception as error:  # the peer's own failure, of whatever kind, is what we report
        print(f"FlexAttention does not run: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        return None
    return Candidate(call, lambda: call()[0].transpose(0, 1).flatten(1))


def onnxruntime(sizes: Sizes, count: int, causal: bool) -> Candidate:
    """The fused operator that exporters of its makers write."""
    from onnx import TensorProto, helper

    rows = dict(zip(("query", "key", "value"), sizes.rows(), strict=True))
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in rows.items()]
    node = helper.make_node(
        "MultiHeadAttention",
        list(rows),
        ["y"],
        domain="com.microsoft",
        num_heads=HEADS,
        scale=sizes.scale,
        unidirectional=int(causal),
    )
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 3)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "one", infos, [result])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    peer = onnxruntime_peer(model, rows, count)
    return Candidate(peer.call, lambda: peer.outputs()[0][0])


def error_of(sizes: Sizes, seen: Callable[[torch.Tensor], torch.Tensor], y: torch.Tensor) -> float:
    """The largest error of some queries; ``seen`` gives their keys, ``[heads, queries, keys]``."""
    chosen = torch.linspace(0, sizes.length - 1, _CHECKED).long()
    q, k, v = (sizes.split(x)[0].double() for x in sizes.rows())
    scores = (q[:, chosen] @ k.mT * sizes.scale).masked_fill(~seen(chosen), -torch.inf)
    expected = (scores.softmax(-1) @ v).nan_to_num(0.0).transpose(0, 1).flatten(1)
    return float((y[chosen] - expected).abs().max() / expected.abs().max())


def random_blocks(sizes: Sizes, percent: int) -> BlockMask:
    """Full blocks at random, the same number for each block of queries."""
    count = -(-sizes.length // 64)
    generator = torch.Generator().manual_seed(percent)
    order = torch.rand(1, HEADS, count, count, generator=generator).argsort(-1)
    kinds = torch.where(order < round(count * percent / 100), FULL, 0)
    return BlockMask.of_kinds(kinds, (sizes.length, sizes.length))


def dense_cell(sizes: Sizes, count: int, given: argparse.Namespace) -> Cell:
    candidates = {
        "sparsify": ours(sizes, Band(), None, count),
        "torch": torch_dense(sizes, False),
        "onnxruntime": onnxruntime(sizes, count, False),
    }
    samples = timed(candidates, given)
    best = fastest(samples, ("torch", "onnxruntime"))
    everything = torch.ones(1, 1, 1, dtype=torch.bool)
    error = error_of(sizes, lambda _: everything, candidates["sparsify"].result())
    return cell("dense", sizes, count, 1.0, error, samples, ("vs", best, "sparsify"))


def sparse_cell(
    part: str,
    sizes: Sizes,
    band: Band,
    blocks: BlockMask,
    count: int,
    given: argparse.Namespace,
) -> Cell:
    listed = part == "blocks"
    candidates: dict[str, Candidate | None] = {
        "sparsify": ours(sizes, band, blocks if listed else None, count),
        "our dense": ours(sizes, Band(), None, count),
        "torch": torch_dense(sizes, part == "causal"),
        "flex": flex(sizes, blocks) if given.flex else None,
        "onnxruntime": onnxruntime(sizes, count, part == "causal"),
    }
    running = {name: c for name, c in candidates.items() if c is not None}

    def seen(chosen: torch.Tensor) -> torch.Tensor:
        keys = torch.arange(sizes.length)
        if not listed:
            return band(0, 0, chosen[:, None], keys)[None]
        return (blocks.kinds[0, :, chosen // 64] == FULL)[..., keys // 64]

    error = error_of(sizes, seen, running["sparsify"].result())
    samples = timed(running, given)
    return cell(part, sizes, count, blocks.density, error, samples, ("", "sparsify", "our dense"))


def timed(candidates: dict[str, Candidate], given: argparse.Namespace) -> Any:
    calls = {name: candidate.call for name, candidate in candidates.items()}
    return interleave(calls, rounds=given.rounds, seconds=given.seconds, settle=0.02)


def cell(
    part: str,
    sizes: Sizes,
    count: int,
    density: float,
    error: float,
    samples: Any,
    compared: tuple[str, str, str],
) -> Cell:
    _, numerator, denominator = compared
    return {
        "part": part,
        "length": sizes.length,
        "head_dim": sizes.head_dim,
        "threads": count,
        "density": density,
        "best_peer": numerator if part == "dense" else fastest(
            samples, [n for n in samples if n in ("torch", "flex", "onnxruntime")]
        ),
        "ratio": ratio(samples[numerator], samples[denominator]).to_dict(),
        "times": {name: s.to_dict() for name, s in samples.items()},
        "max_rel_error": error,
    }  # fmt: skip


def cells_of(given: argparse.Namespace) -> Iterator[list[Cell]]:
    for count in sorted(given.threads, reverse=True):
        with threads(count):
            for part in given.part:
                yield list(_part(part, count, given))


def _part(part: str, count: int, given: argparse.Namespace) -> Iterator[Cell]:
    if part == "dense":
        for head_dim in given.head_dims:
            for length in given.lengths:
                yield dense_cell(Sizes(length, head_dim), count, given)
        return
    lengths = [n for n in given.lengths if n >= 2048] or given.lengths
    for sizes in (Sizes(length, 64) for length in lengths):
        lengths_of = (sizes.length, sizes.length)
        if part == "blocks":
            for percent in given.densities:
                blocks = random_blocks(sizes, percent)
                yield sparse_cell(part, sizes, Band(), blocks, count, given)
            continue
        band = Band(True) if part == "causal" else Band(True, WINDOW, SINKS)
        yield sparse_cell(part, sizes, band, BlockMask.of_band(band, lengths_of), count, given)


def table(cells: Any) -> Table:
    dense = cells[0]["part"] == "dense"
    made = Table(title=f"{cells[0]['part']}, {cells[0]['threads']} threads")
    meaning = "best peer / ours" if dense else "ours / our dense"
    names = list(cells[0]["times"])
    columns = ("tokens", "head dim", "density", meaning, *(f"{n} ms" for n in names), "error")
    for column in columns:
        made.add_column(column)
    for one in cells:
        times = (f"{one['times'][n]['p50_ms']:.2f}" if n in one["times"] else "-" for n in names)
        made.add_row(
            str(one["length"]),
            str(one["head_dim"]),
            f"{one['density']:.1%}",
            interval(one["ratio"]),
            *times,
            f"{one['max_rel_error']:.0e}",
        )
    return made


def summary(cells: Any) -> Iterator[str]:
    dense = [c for c in cells if c["part"] == "dense"]
    slower = [c for c in dense if c["ratio"]["median"] < 1]
    if dense:
        yield f"{len(slower)} of {len(dense)} dense cells are slower than the fastest peer"
    for one in (c for c in cells if c["part"] != "dense"):
        over = one["ratio"]["median"] - one["density"]
        yield f"{one['part']} {one['length']}: {over:+.3f} over its density of {one['density']:.3f}"


def main() -> int:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    made.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    made.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    made.add_argument("--densities", type=int, nargs="+", default=DENSITIES, help="percent")
    made.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--seconds", type=float, default=0.05, help="length of one turn")
    made.add_argument("--no-flex", dest="flex", action="store_false", help="without FlexAttention")
    made.add_argument("--json", action="store_true", help="one record a line, no tables")
    made.add_argument("--output", type=Path, help="also write the records to this file")
    given = made.parse_args()
    return publish("Attention", given, cells_of(given), table, summary)


if __name__ == "__main__":
    sys.exit(main())
