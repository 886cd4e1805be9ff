"""SmolLM2-135M, prefill and decode, against torch eager, torch.compile, ONNX Runtime and OpenVINO.

    python -m benchmarks.decode
    python -m benchmarks.decode --sparsity 0 80 --threads 1

Decode is one step of one sequence that holds ``--context`` tokens already; prefill is a prompt of
``--prompt`` tokens up to the logits of its last one, which is the time to first token. All
sparsities and all peers take turns in one process. The peers run the dense model: they gain nothing
from zeros. Ratios are the fastest peer's time over ours, above 1 when we are faster, with their 95%
interval over the rounds. The error is that of the logits against float64 eager PyTorch, over their
largest value. Resident memory is measured in a process of its own: the weights as loaded, and one
prompt run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sparsify
from benchmarks.cells import verdict
from benchmarks.checkpoints import SMOLLM2
from benchmarks.steps import DecodeStep
from sparsify.bench import (
    Machine,
    OnnxModel,
    Peer,
    PrefillStep,
    fastest,
    float64_reference,
    interleave,
    model_peers,
    ratio,
    relative_error,
    threads,
)
from sparsify.bench.resident import resident_bytes
from sparsify.generation import CompiledCausalLM

SPARSITIES, THREADS = (0, 50, 70, 80, 90), (1, 2)
AGAINST = ("torch", "torch.compile", "onnxruntime", "openvino")
TOLERANCE = 2e-5
"""Largest relative error of the logits that we promise."""


@dataclass(frozen=True)
class Phase:
    """Decode or prefill: the step that peers run, and its inputs."""

    name: str
    step: type[torch.nn.Module]
    ids: torch.Tensor
    past: tuple[torch.Tensor, ...] = ()

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return (self.ids, *self.past)


def phases(model: Any, context: int, prompt: int) -> list[Phase]:
    generator = torch.Generator().manual_seed(context + prompt)
    ids = torch.randint(1000, 40000, (1, prompt), generator=generator)
    with torch.no_grad():
        cache = model(ids[:, :context], use_cache=True).past_key_values
    past = tuple(t.contiguous() for layer in cache.layers for t in (layer.keys, layer.values))
    return [
        Phase("decode", DecodeStep, ids[:, context : context + 1], past),
        Phase("prefill", PrefillStep, ids),
    ]


def our_call(lm: CompiledCausalLM, phase: Phase, prefix: torch.Tensor) -> Callable[[], Any]:
    """One step, again and again from the same state."""
    cache = lm.new_cache(1, prefix.shape[1] + phase.ids.shape[1])
    if prefix.shape[1]:
        lm(prefix, cache)
    start = cache.lengths

    def call() -> torch.Tensor:
        cache.lengths = start
        return lm(phase.ids, cache)

    return call


def compiled_step(module: torch.nn.Module, inputs: tuple[Any, ...], count: int) -> Peer:
    """``torch.compile`` with its default back end, fixed shapes."""
    run = torch.compile(module, dynamic=False)

    def call() -> Any:
        with torch.no_grad():
            return run(*inputs)

    def outputs() -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = call()
        return found[:1]

    return Peer("torch.compile", torch.__version__, call, outputs, {"num_threads": count})


def peers_of(
    model: Any, phase: Phase, count: int, names: tuple[str, ...], onnx: OnnxModel
) -> dict[str, Peer]:
    module = phase.step(model).eval()
    others = tuple(name for name in names if name != "torch.compile")
    peers = model_peers(module, phase.inputs, count, others, onnx)
    if "torch.compile" in names:
        peers["torch.compile"] = compiled_step(module, phase.inputs, count)
    return peers


def cells(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    models = {sparsity: SMOLLM2.load(sparsity) for sparsity in given.sparsity}
    dense = models.get(0) or SMOLLM2.load()
    both = phases(dense, given.context, given.prompt)
    onnx = {phase.name: OnnxModel.export(phase.step(dense).eval(), phase.inputs) for phase in both}
    prefix = both[1].ids[:, : given.context]
    with tempfile.TemporaryDirectory(prefix="decode-") as folder:
        # The most threads first: those that a peer starts keep to the processors of that moment.
        for count in sorted(given.threads, reverse=True):
            ours = {
                s: sparsify.compile(model, num_threads=count, tune=given.tune)
                for s, model in models.items()
            }
            memory = resident(ours, both[1], count, Path(folder), onnx) if given.memory else {}
            for phase in both:
                before = prefix if phase.name == "decode" else prefix[:, :0]
                with threads(count):
                    yield from measure(
                        models, ours, phase, before, count, given, onnx[phase.name], memory
                    )


def measure(
    models: dict[int, Any],
    ours: dict[int, CompiledCausalLM],
    phase: Phase,
    before: torch.Tensor,
    count: int,
    given: argparse.Namespace,
    onnx: OnnxModel,
    memory: dict[str, int | None],
) -> Iterator[dict[str, Any]]:
    dense = models.get(0) or next(iter(models.values()))
    calls = {f"sparsify {s}": our_call(lm, phase, before) for s, lm in ours.items()}
    errors = {}
    for sparsity, model in models.items():
        whole = torch.cat([before, phase.ids], dim=1)
        expected = float64_reference(PrefillStep(model), (whole,))[0]
        _, errors[sparsity] = relative_error(calls[f"sparsify {sparsity}"](), expected)
    peers = peers_of(dense, phase, count, tuple(given.against), onnx)
    samples = interleave({**calls, **peers}, given.rounds, given.seconds)
    best = fastest(samples, peers)
    for sparsity in ours:
        mine = samples[f"sparsify {sparsity}"]
        tokens = 1 if phase.name == "decode" else phase.ids.shape[1]
        yield {
            "phase": phase.name,
            "sparsity": sparsity,
            "threads": count,
            "context": before.shape[1],
            "tokens": tokens,
            "ms": {"sparsify": mine.median * 1e3}
            | {name: samples[name].median * 1e3 for name in peers},
            "tokens_per_second": tokens / mine.median,
            "best_peer": best,
            "speedup": ratio(mine, samples[best]).inverse.to_dict(),
            "weight_bytes": ours[sparsity].nbytes,
            "resident_bytes": {k: v for k, v in memory.items() if k != "sparsify"}
            | {"sparsify": memory.get(f"sparsify {sparsity}")},
            "max_rel_error": errors[sparsity],
        }


def resident(
    ours: dict[int, CompiledCausalLM],
    phase: Phase,
    count: int,
    folder: Path,
    onnx: dict[str, OnnxModel],
) -> dict[str, int | None]:
    """Growth of a process by loading a model and running one prompt."""
    found: dict[str, int | None] = {}
    for sparsity, lm in ours.items():
        path = folder / f"{sparsity}.sparsify"
        lm.save(path)
        found[f"sparsify {sparsity}"] = resident_bytes("sparsify", path, (phase.ids,), count)
    graph = onnx[phase.name]
    for name in ("onnxruntime", "openvino"):
        found[name] = resident_bytes(name, graph.path, graph.feeds, count)
    found["torch"] = resident_bytes("torch", graph.pt2(), phase.inputs, count)
    return found


def table(found: list[dict[str, Any]]) -> Table:
    first = found[0]
    peers = [name for name in first["ms"] if name != "sparsify"]
    what = (
        f"decode, one token after {first['context']}"
        if first["phase"] == "decode"
        else f"prefill of {first['tokens']} tokens"
    )
    plural = "" if first["threads"] == 1 else "s"
    times = ", ".join(f"{name} {first['ms'][name]:.1f} ms" for name in peers)
    made = Table(
        title=f"{what}, {first['threads']} thread{plural}; dense: {times}", title_justify="left"
    )
    for name in ("zeros", "ms", "tokens/s", "x best peer", "weights MB", "resident MB", "error"):
        made.add_column(name, justify="right", no_wrap=True)
    for cell in found:
        speed, memory = cell["speedup"], cell["resident_bytes"]["sparsify"]
        made.add_row(
            f"{cell['sparsity']}%",
            f"{cell['ms']['sparsify']:.1f}",
            f"{cell['tokens_per_second']:.1f}",
            f"{speed['median']:.2f} [{speed['low']:.2f}, {speed['high']:.2f}] {cell['best_peer']}",
            f"{cell['weight_bytes'] / 1e6:.0f}",
            "" if memory is None else f"{memory / 1e6:.0f}",
            f"{cell['max_rel_error']:.0e}",
        )
    return made


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sparsity", type=int, nargs="+", default=SPARSITIES, help="percent")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--context", type=int, default=127, help="tokens before the decoded one")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--against", nargs="+", default=AGAINST)
    parser.add_argument("--tune", default="off", help="off, quick or full")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one turn")
    parser.add_argument("--json", action="store_true", help="one record a line")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when an error exceeds what we promise."""
    given = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    machine = Machine.here()
    console = Console(quiet=given.json, highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(f"SmolLM2-135M, fp32, {machine.line(max(given.threads))}")
    group: list[dict[str, Any]] = []
    wrong = 0
    for cell in cells(given):
        wrong += not cell["max_rel_error"] <= TOLERANCE
        if given.json:
            print(json.dumps({**cell, "machine": machine.to_dict()}, sort_keys=True), flush=True)
        group.append(cell)
        if len(group) == len(given.sparsity):
            console.print(table(group))
            group = []
    return verdict(wrong, TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
