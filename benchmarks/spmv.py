"""Linear kernels for few tokens against dense peers, with weights that come from memory.

    python -m benchmarks.spmv
    python -m benchmarks.spmv --shapes 4096x4096 --sparsity 80 --tokens 1 --threads 1

One cell is ``y[tokens, out] = x[tokens, in] @ W.T``, row-major. A language model reads every weight
once a token, so nothing is in cache when its turn comes: we and each peer hold as many copies of
the weight as fill ``--cold`` megabytes, and take them in turns. Weights are exact in bfloat16:
layouts may store them so (``bf16``) or may not (``fp32``); the peers are dense fp32. OpenVINO, ONNX
Runtime, torch and a plain streaming read take turns with us. Speed-ups are the fastest peer's time
over ours with their 95% interval over the rounds. The limit is the greater of the packed bytes over
the bandwidth of the streaming read and the kernel's cycles when nothing waits for memory (as the
cost model has them); its share of our time is what we reach of it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table

from benchmarks.cells import (
    TOLERANCE,
    Cell,
    completed,
    interval,
    parser,
    publish,
    thread_counts,
    worst,
)
from benchmarks.linears import Weight, built, cheapest, random_weight
from benchmarks.stream import Stream
from sparsify.bench import (
    fastest,
    interleave,
    matmul_peers,
    ratio,
    relative_error,
    threads,
)
from sparsify.layouts import Layout, WeightStats

SHAPES = ("4096x4096", "11008x4096", "1536x384")
SPARSITIES = (0, 50, 60, 70, 80, 90, 95)
TOKENS = (1, 2, 4, 8)
VALUES = ("fp32", "bf16")
QUICK = {"shapes": SHAPES[2:], "sparsity": (0, 50, 80), "tokens": (1, 4), "rounds": 5}
_STREAM = 8 << 20
"""Bytes of one streaming read: about what a sparse weight has, so that both are as long."""


class Turns:
    """Calls that take turns, each on its own copy of a weight."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self._next = itertools.cycle(calls).__next__

    def __call__(self) -> None:
        self._next()()


class Bench:
    """Kernels of the cells of one shape, one token count and one thread count."""

    def __init__(
        self, weights: Sequence[Weight], tokens: int, given: argparse.Namespace, count: int
    ):
        from sparsify.codegen.cost import CpuCostModel
        from sparsify.codegen.registry import LinearSite, linear_kernels
        from sparsify.codegen.target import Target

        target = Target.parse("native")
        self.tokens, self.given, self.count, self.isa = tokens, given, count, target.isa
        self.kinds = linear_kernels
        cost = CpuCostModel(target, count)
        self.cells: list[tuple[Weight, str, Layout, Any]] = []
        for weight, values in itertools.product(weights, given.values):
            stats = replace(WeightStats(weight.shape, weight.nnz), bf16_exact=values == "bf16")
            layout = cheapest(cost, stats, tokens)
            kernels = linear_kernels(layout, tokens)
            kernel = kernels.kernel(self.isa, LinearSite(*weight.shape), layout)
            self.cells.append((weight, values, layout, kernel))
        self.stream = Stream(self.isa)
        kernels = {kernel.name: kernel for *_, kernel in self.cells}
        self._functions = built([*kernels.values(), self.stream], target)

    def floor(self, weight: Weight, layout: Layout) -> float:
        """Predicted seconds of the instructions alone."""
        kernels = self.kinds(layout, self.tokens)
        cycles = kernels.cycles(self.isa, layout, weight.shape, weight.nnz, self.tokens)
        return float(cycles / self.isa.hertz / self.count)

    def copies(self, nbytes: int) -> int:
        return max(1, math.ceil(self.given.cold * 1e6 / nbytes))

    def ours(
        self, kernel: Any, weight: Weight, layout: Layout, x: torch.Tensor
    ) -> tuple[Turns, torch.Tensor, int]:
        """(the call, what it fills, packed bytes)."""
        packed = layout.pack(weight.matrix)
        nbytes = layout.nbytes(packed)
        y = torch.full((self.tokens, weight.shape[0]), math.nan)
        held = [[_shared(t.clone()) for t in packed.values()] for _ in range(self.copies(nbytes))]
        function, given, filled = self._functions[kernel.name], _shared(x), _shared(y)
        calls = [lambda tensors=tensors: function(given, *tensors, filled) for tensors in held]
        return Turns(calls), y, nbytes

    def streaming(self, nbytes: int) -> tuple[Turns, int]:
        """The read of so many bytes, from as many places as the weights have copies."""
        parts = self.stream.parts(nbytes)
        source, sink = self.stream.shapes(parts)
        function, filled = self._functions[self.stream.name], _shared(torch.empty(sink))
        read = 4 * math.prod(source)
        places = [_shared(torch.ones(source)) for _ in range(self.copies(read))]
        return Turns([lambda place=place: function(place, filled) for place in places]), read


def _shared(tensor: torch.Tensor) -> Any:
    from tvm.runtime import from_dlpack

    from sparsify.codegen.runtime.executor import aligned

    return from_dlpack(aligned(tensor))


def measure(
    weights: Sequence[Weight], tokens: int, given: argparse.Namespace, count: int
) -> Iterator[Cell]:
    """The cells of weights of one shape, all timed in turns with the same peers."""
    from sparsify.codegen.runtime import pool

    shape = out, features = weights[0].shape
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(tokens))
    bench = Bench(weights, tokens, given, count)
    candidates: dict[str, Callable[[], Any]] = {}
    cells = []
    with threads(count), pool.use_threads(count):
        for i, (weight, values, layout, kernel) in enumerate(bench.cells):
            call, y, nbytes = bench.ours(kernel, weight, layout, x)
            call()
            _, error = relative_error(y, x.double() @ weight.matrix.double().t())
            candidates[f"ours {i}"] = call
            cells.append((i, weight, values, layout, nbytes, error))
        first = weights[0].matrix
        reference = (x.double() @ first.double().t(),)
        peers: dict[str, Turns] = {}
        for name in given.against:
            held = [
                matmul_peers(first.clone(), x, count, (name,))[name]
                for _ in range(bench.copies(4 * out * features))
            ]
            held[0].check(reference, TOLERANCE)
            peers[name] = Turns(held)
        stream, read = bench.streaming(min(_STREAM, 4 * out * features))
        everything = {**candidates, **peers, "stream": stream}
        samples = interleave(everything, given.rounds, given.seconds)
    best = fastest(samples, peers)
    bandwidth = read / samples["stream"].median
    for i, weight, values, layout, nbytes, error in cells:
        ours = samples[f"ours {i}"]
        limit = max(nbytes / bandwidth, bench.floor(weight, layout))
        yield {
            "shape": list(shape),
            "sparsity": weight.sparsity,
            "values": values,
            "tokens": tokens,
            "threads": count,
            "layout": layout.spec,
            "bytes": nbytes,
            "us": ours.median * 1e6,
            "peers_us": {name: samples[name].median * 1e6 for name in peers},
            "best_peer": best,
            "speedup": ratio(ours, samples[best]).inverse.to_dict(),
            "bandwidth": bandwidth,
            "of_limit": limit / ours.median,
            "max_rel_error": error,
        }


def table(cells: Sequence[Cell]) -> Table:
    """What was measured together."""
    cell = cells[0]
    peers = ", ".join(f"{name} {us:.0f} us" for name, us in cell["peers_us"].items())
    made = Table(
        title=f"{'x'.join(map(str, cell['shape']))}, tokens {cell['tokens']}, threads "
        f"{cell['threads']}; memory {cell['bandwidth'] / 1e9:.1f} GB/s; dense: {peers}",
        title_justify="left",
    )
    for name in ("sparsity", "values", "layout"):
        made.add_column(name, no_wrap=True)
    for name in ("MB", "us", "GB/s", "of limit", "x dense", "error"):
        made.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        made.add_row(
            f"{cell['sparsity']}%",
            cell["values"],
            cell["layout"],
            f"{cell['bytes'] / 1e6:.2f}",
            f"{cell['us']:.1f}",
            f"{cell['bytes'] / cell['us'] / 1e3:.1f}",
            f"{cell['of_limit']:.0%}",
            interval(cell["speedup"]),
            f"{cell['max_rel_error']:.0e}",
        )
    return made


def summary(cells: Sequence[Cell]) -> Iterator[str]:
    def name(cell: Cell) -> str:
        return f"{cell['sparsity']}% {cell['values']}"

    yield from worst(cells, lambda cell: cell["speedup"], name)


def rounded(shape: str, sparsity: int) -> Weight:
    weight = random_weight(shape, sparsity)
    return replace(weight, matrix=weight.matrix.bfloat16().float())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__, seconds=0.03)
    options.add_argument("--shapes", nargs="+", help="OUTxIN")
    options.add_argument("--values", choices=VALUES, nargs="+", default=VALUES)
    options.add_argument("--cold", type=float, default=256, help="MB that copies fill, for each")
    full = {"shapes": SHAPES, "sparsity": SPARSITIES, "tokens": TOKENS, "rounds": 12}
    return completed(options.parse_args(arguments), full, QUICK)


def measured(given: argparse.Namespace) -> Iterator[list[Cell]]:
    counts = thread_counts(given)
    for count, shape, tokens in itertools.product(counts, given.shapes, given.tokens):
        weights = [rounded(shape, sparsity) for sparsity in given.sparsity]
        yield list(measure(weights, tokens, given, count))


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when an error exceeds what we promise."""
    given = parse(arguments)
    title = "few tokens, cold weights"
    return publish(title, given, measured(given), table, summary)


if __name__ == "__main__":
    sys.exit(main())
