"""Linears and gated feed-forward networks whose activations are zero for the most part.

    python -m benchmarks.gating --threads 1
    python -m benchmarks.gating --linears 4096x4096 --ffns --inactive 90 --tokens 1

Two things are compiled as a user compiles them, once as they are (``dense``) and once told how much
is inactive: a linear ``[out, in]`` with zeros among its inputs, and a network ``width x features``,
``down(gate(silu(g)) * up)``, whose gate closes below a threshold that so many of its outputs do not
reach. Both take turns with each other and with the dense network in OpenVINO, ONNX Runtime and
torch. Inputs take turns as well: each token has zeros of its own, so the union of several tokens
is as large as it ever gets. ``of dense`` is our time over that of our own dense kernels, ``x peer``
the fastest peer's time over ours.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from benchmarks.cells import (
    Cell,
    completed,
    interval,
    parser,
    publish,
    thread_counts,
    worst,
)
from benchmarks.spmv import Turns
from sparsify.bench import (
    MATMUL_PEERS,
    fastest,
    interleave,
    model_peers,
    ratio,
    relative_error,
    threads,
)

LINEARS, FFNS = ("4096x4096",), ("4096x11008",)
INACTIVE, TOKENS = (0, 50, 70, 90), (1, 8)
QUICK: dict[str, Any] = {
    "linears": ("512x768",),
    "ffns": ("256x768",),
    "inactive": (50, 90),
    "tokens": (1, 8),
    "rounds": 5,
}
GOALS = {
    ("linear", 1, 50): 0.50, ("linear", 1, 70): 0.32, ("linear", 1, 90): 0.14,
    ("ffn", 1, 50): 0.73, ("ffn", 1, 70): 0.60, ("ffn", 1, 90): 0.45,
    **{(kind, 8, share): 1.0 for kind in ("linear", "ffn") for share in INACTIVE},
}  # fmt: skip
"""What the time over our own dense kernels should be at most."""

_INPUTS = 8
"""Inputs that take turns."""


class DenseLinear(nn.Module):
    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        out, features = shape
        generator = torch.Generator().manual_seed(out * features)
        self.weight = nn.Parameter(torch.randn(out, features, generator=generator) / features**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class ActiveLinear(nn.Module):
    """The same with inputs of which a share is not zero."""

    def __init__(self, dense: DenseLinear, active: float) -> None:
        super().__init__()
        self.weight, self.active = dense.weight, active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.sparsify.active_linear(
            x, [self.weight], "dense", *self.weight.shape, self.active
        )
        return y


class DenseFfn(nn.Module):
    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        width, features = shape
        generator = torch.Generator().manual_seed(width * features)

        def random(*extents: int) -> nn.Parameter:
            weight = torch.randn(*extents, generator=generator)
            return nn.Parameter(weight.mul_(extents[1] ** -0.5))

        self.gate, self.up = random(features, width), random(features, width)
        self.down = random(width, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class GatedFfn(nn.Module):
    """The same with a gate that is zero below a threshold; a share of it is not."""

    def __init__(self, dense: DenseFfn, active: float, threshold: float) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.active = dense.gate, dense.up, dense.down, active
        self.threshold = nn.Parameter(torch.tensor([threshold]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features, width = self.gate.shape
        opened = F.silu(F.linear(x, self.gate))
        gate = torch.ops.sparsify.gate(opened, "threshold", [self.threshold])
        inner = torch.ops.sparsify.gated_linear(
            x, gate, [self.up], "dense", features, width, self.active
        )
        y: torch.Tensor = torch.ops.sparsify.active_linear(
            inner, [self.down], "dense", width, features, self.active
        )
        return y


def linears(
    shape: tuple[int, int], inactive: Sequence[int], tokens: int
) -> tuple[nn.Module, dict[int, tuple[nn.Module, list[torch.Tensor]]]]:
    """The dense module; for each percentage the one that is told of it, and inputs."""
    dense, made = DenseLinear(shape), {}
    generator = torch.Generator().manual_seed(tokens)
    for percent in inactive:
        inputs = []
        for _ in range(_INPUTS):
            x = torch.randn(tokens, shape[1], generator=generator)
            for row in x:  # exactly so many
                row[torch.randperm(len(row), generator=generator)[: len(row) * percent // 100]] = 0
            inputs.append(x)
        made[percent] = (ActiveLinear(dense, 1 - percent / 100), inputs)
    return dense, made


def ffns(
    shape: tuple[int, int], inactive: Sequence[int], tokens: int
) -> tuple[nn.Module, dict[int, tuple[nn.Module, list[torch.Tensor]]]]:
    """As `linears`."""
    dense, made = DenseFfn(shape), {}
    generator = torch.Generator().manual_seed(tokens)
    inputs = [torch.randn(tokens, shape[0], generator=generator) for _ in range(_INPUTS)]
    with torch.no_grad():
        sizes = F.silu(F.linear(torch.cat(inputs), dense.gate)).abs().flatten().sort().values
    for percent in inactive:
        threshold = _between(sizes, len(sizes) * percent // 100) if percent else 0.0
        made[percent] = (GatedFfn(dense, 1 - percent / 100, threshold), inputs)
    return dense, made


def _between(sizes: torch.Tensor, place: int) -> float:
    """Within half a percent of a place the middle of the widest gap: a size that rounding moves
    past the threshold would count as an error."""
    reach = len(sizes) // 200
    near = sizes[max(0, place - reach) : place + reach]
    at = int(near.diff().argmax())
    return float(near[at] + near[at + 1]) / 2


MAKERS = {"linear": linears, "ffn": ffns}


def measure(
    kind: str, shape: tuple[int, int], tokens: int, given: argparse.Namespace, count: int
) -> Iterator[Cell]:
    """The cells of one shape and token count, all timed in turns."""
    import sparsify

    dense, made = MAKERS[kind](shape, given.inactive, tokens)
    example = next(iter(made.values()))[1][0]
    with threads(count):
        own = sparsify.compile(dense.eval(), (example,), dynamic_shapes=None, num_threads=count)
        candidates: dict[str, Callable[[], Any]] = {}
        facts = {}
        for percent, (module, inputs) in made.items():
            compiled = sparsify.compile(
                module.eval(), (inputs[0],), dynamic_shapes=None, num_threads=count
            )
            candidates[f"ours {percent}"] = _turns(compiled, inputs)
            candidates[f"dense {percent}"] = _turns(own, inputs)
            with torch.no_grad():
                errors = [
                    relative_error(compiled(x), module.double()(x.double())) for x in inputs[:2]
                ]
            module.float()
            reasons = [d.reason for d in compiled.report if d.made_by == "select_layout"]
            facts[percent] = (max(error for _, error in errors), reasons[-1])
        peers = model_peers(dense, (example,), count, given.against)
        samples = interleave({**candidates, **peers}, given.rounds, given.seconds)
    best = fastest(samples, peers)
    for percent, (error, reason) in facts.items():
        ours, plain = samples[f"ours {percent}"], samples[f"dense {percent}"]
        yield {
            "kind": kind,
            "shape": list(shape),
            "inactive": percent,
            "tokens": tokens,
            "threads": count,
            "layout": reason,
            "us": ours.median * 1e6,
            "dense_us": plain.median * 1e6,
            "of_dense": ratio(ours, plain).to_dict(),
            "goal": GOALS.get((kind, tokens, percent)),
            "peers_us": {name: samples[name].median * 1e6 for name in peers},
            "best_peer": best,
            "dense_speedup": ratio(plain, samples[best]).inverse.to_dict(),
            "speedup": ratio(ours, samples[best]).inverse.to_dict(),
            "max_rel_error": error,
        }


def _turns(compiled: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> Turns:
    return Turns([lambda x=x: compiled(x) for x in inputs])


def table(cells: Sequence[Cell]) -> Table:
    cell = cells[0]
    peers = ", ".join(f"{name} {us:.0f} us" for name, us in cell["peers_us"].items())
    made = Table(
        title=f"{cell['kind']} {'x'.join(map(str, cell['shape']))}, tokens {cell['tokens']}, "
        f"threads {cell['threads']}; dense: {peers}",
        title_justify="left",
    )
    made.add_column("inactive", no_wrap=True)
    for name in ("us", "dense us", "of dense", "goal", "x peer", "dense x peer", "error"):
        made.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        made.add_row(
            f"{cell['inactive']}%",
            f"{cell['us']:.0f}",
            f"{cell['dense_us']:.0f}",
            interval(cell["of_dense"]),
            "" if cell["goal"] is None else f"{cell['goal']:.2f}",
            interval(cell["speedup"]),
            interval(cell["dense_speedup"]),
            f"{cell['max_rel_error']:.0e}",
        )
    return made


def summary(cells: Sequence[Cell]) -> Iterator[str]:
    missed = [c for c in cells if c["goal"] is not None and c["of_dense"]["low"] > c["goal"]]
    for cell in missed:
        yield (
            f"misses {cell['goal']:.2f} of dense: {cell['kind']} {cell['shape']}, "
            f"{cell['inactive']}%, {cell['tokens']} tokens, threads {cell['threads']}: "
            f"{interval(cell['of_dense'])}"
        )
    yield f"{len(missed)} of {len(cells)} cells miss their goal"
    yield from worst(
        cells, lambda cell: cell["speedup"], lambda cell: f"{cell['kind']} {cell['inactive']}%"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__, seconds=0.03)
    options.add_argument("--linears", nargs="*", help="OUTxIN")
    options.add_argument("--ffns", nargs="*", help="WIDTHxFEATURES")
    options.add_argument("--inactive", type=int, nargs="+", help="percent")
    full = {"linears": LINEARS, "ffns": FFNS, "inactive": INACTIVE, "tokens": TOKENS, "rounds": 12}
    given = completed(options.parse_args(arguments), full, QUICK)
    given.against = tuple(name for name in MATMUL_PEERS if name in given.against)
    return given


def measured(given: argparse.Namespace) -> Iterator[list[Cell]]:
    shapes = [("linear", s) for s in given.linears] + [("ffn", s) for s in given.ffns]
    for count, (kind, shape), tokens in itertools.product(
        thread_counts(given), shapes, given.tokens
    ):
        left, right = map(int, shape.split("x"))
        yield list(measure(kind, (left, right), tokens, given, count))


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when an error exceeds what we promise."""
    given = parse(arguments)
    return publish("inactive features", given, measured(given), table, summary)


if __name__ == "__main__":
    sys.exit(main())
