"""``sparsify benchmark``: a model against other runtimes, interleaved in one process."""

from __future__ import annotations

import platform
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from torch.export import ExportedProgram

from sparsify.bench import (
    CompiledPrefill,
    Machine,
    OnnxModel,
    Peer,
    PrefillStep,
    Ratio,
    Samples,
    compiled_peer,
    fastest,
    flat_tensors,
    interleave,
    model_peers,
    ratio,
    relative_error,
    split_inputs,
    threads,
)
from sparsify.bench.resident import resident_bytes
from sparsify.cli import options
from sparsify.cli.benchmark_reference import Reference
from sparsify.cli.compile import compile_loaded
from sparsify.cli.console import command, note, show, show_json, step
from sparsify.cli.foreign import benchmark_elsewhere
from sparsify.cli.models import LoadedModel, load_model, need_inputs, quiet
from sparsify.cli.onnx import OnnxOptions
from sparsify.cli.source import Source
from sparsify.codegen.target import Target

OURS = "sparsify"
_DIFFER = 1


@command
def benchmark(
    model: options.Model,
    against: Annotated[
        str, typer.Option(help="Peers, separated by commas: torch, onnxruntime, openvino.")
    ] = "torch,onnxruntime,openvino",
    target: options.Target = "native",
    thread_count: Annotated[
        int, typer.Option("--threads", min=1, help="Threads that every candidate gets.")
    ] = 1,
    batch: options.Batch = None,
    seq: options.Seq = None,
    shape: options.Shape = None,
    constant: options.Constant = None,
    rounds: Annotated[int, typer.Option(min=2, help="Interleaved rounds.")] = 15,
    seconds: Annotated[float, typer.Option(help="Length of one candidate's turn.")] = 0.2,
    tolerance: Annotated[
        float, typer.Option(help="Largest error relative to the output's scale.")
    ] = 1e-4,
    memory: Annotated[bool, typer.Option(help="Measure resident size in fresh processes.")] = True,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="USER@HOST[:PORT]",
            help="Time the model, exported as C for --target, on this machine, by ssh.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Time MODEL, compiled, against other runtimes; of a language model, a prompt's prefill.

    With --target of another kind of machine, count instructions in an emulator instead, which are
    proxies and no times; with --device, time it there.

    Exits with 1 when any candidate's outputs differ from the reference by more than --tolerance.
    """
    chosen = Target.parse(target)
    if device or chosen.machine != platform.machine():
        source = Source(model, batch, seq, OnnxOptions.of(shape, constant))
        if not benchmark_elsewhere(source, chosen, device, rounds, tolerance, as_json):
            note("error: outputs differ from the reference")
            raise typer.Exit(_DIFFER)
        return
    peers = tuple(dict.fromkeys(name.strip() for name in against.split(",") if name.strip()))
    with step(f"loading {model}"):
        given = OnnxOptions.of(shape, constant)
        loaded = need_inputs(load_model(model, batch, seq, given))
        file = _own_file(loaded, given)
    machine = Machine.here()
    with threads(thread_count), tempfile.TemporaryDirectory(prefix="sparsify-") as folder:
        record = {"machine": machine.to_dict()} | _measure(
            loaded,
            file,
            peers,
            target,
            thread_count,
            rounds,
            seconds,
            tolerance,
            memory,
            Path(folder),
        )
    if as_json:
        show_json(record)
    else:
        show(_table(record))
    wrong = [name for name, row in record["candidates"].items() if not row["agrees"]]
    if wrong:
        note(f"error: outputs of {', '.join(wrong)} differ from {record['reference']}")
        raise typer.Exit(_DIFFER)


def _own_file(loaded: LoadedModel, given: OnnxOptions) -> OnnxModel | None:
    """An ONNX file as the peers run it, which is as it is."""
    if loaded.kind != "onnx" or not isinstance(loaded.model, ExportedProgram):
        return None
    feeds = given.feeds(loaded.name, flat_tensors(split_inputs(loaded.inputs)))
    return OnnxModel.of(Path(loaded.name), feeds, loaded.model)


def _measure(
    loaded: LoadedModel,
    onnx: OnnxModel | None,
    names: tuple[str, ...],
    target: str,
    count: int,
    rounds: int,
    seconds: float,
    tolerance: float,
    memory: bool,
    folder: Path,
) -> dict[str, Any]:
    module, inputs = loaded.module, loaded.inputs
    if loaded.generates:
        module, inputs = PrefillStep(module).eval(), (inputs[1]["input_ids"],)
    with step("building the peers"), quiet():
        foreign = set(names) - {"torch"}
        if onnx is None and (foreign or memory):
            onnx = OnnxModel.export(module, inputs)
        candidates = model_peers(module, inputs, count, names, onnx)
        reference = Reference.of(module, inputs)
    compiled = compile_loaded(loaded, target=target, num_threads=count)
    ours = folder / "model.sparsify"
    compiled.save(ours)
    call = CompiledPrefill(compiled) if loaded.generates else compiled
    peer = compiled_peer(call, inputs, count, ours.stat().st_size)
    candidates = {OURS: replace(peer, version=version("sparsify-compiler")), **candidates}
    errors = {
        name: relative_error(candidate.outputs(), reference.outputs)
        for name, candidate in candidates.items()
    }
    files = {OURS: ours}
    if onnx is not None:
        files |= {"onnxruntime": onnx.path, "openvino": onnx.path, "torch": onnx.pt2()}
    resident: dict[str, int | None] = dict.fromkeys(candidates)
    if memory and onnx is not None:
        with step("measuring memory"):
            for name in candidates:
                given = inputs if name in (OURS, "torch") else onnx.feeds
                resident[name] = resident_bytes(name, files[name], given, count)
    with step("timing"):
        samples = interleave(candidates, rounds, seconds)
    first = flat_tensors(split_inputs(inputs))
    per_call = first[0].shape[0] if first and first[0].dim() else 1
    rows = {
        name: {
            **_row(candidates[name], samples[name], per_call),
            "file_bytes": files[name].stat().st_size if name in files else None,
            "resident_bytes": resident[name],
            "max_abs_error": errors[name][0],
            "max_rel_error": errors[name][1],
            "agrees": errors[name][1] <= tolerance,
        }
        for name in candidates
    }
    others = [name for name in candidates if name != OURS]
    ratios = {name: ratio(samples[OURS], samples[name]).to_dict() for name in others}
    return {
        "model": loaded.name,
        "measured": "prefill" if loaded.generates else "forward",
        "inputs": [list(tensor.shape) for tensor in first],
        "target": compiled.report.target,
        "threads": count,
        "reference": reference.name,
        "tolerance": tolerance,
        "candidates": rows,
        "ratio": ratios,
        "fastest_peer": fastest(samples, others) if others else None,
    }


def _row(candidate: Peer, samples: Samples, per_call: int) -> dict[str, Any]:
    return {
        "version": candidate.version,
        "settings": dict(candidate.settings),
        **samples.to_dict(),
        "throughput_per_second": per_call / samples.median,
    }


def _table(record: dict[str, Any]) -> Table:
    machine = Machine(**{**record["machine"], "isa": tuple(record["machine"]["isa"])})
    shapes = ", ".join("x".join(map(str, shape)) for shape in record["inputs"])
    what = f"{record['model']}, {record['measured']}, inputs {shapes}"
    table = Table(
        title=f"{what}\n{machine.line(record['threads'])}",
        caption=f"ratio: time of sparsify over the peer's, median of interleaved rounds with its "
        f"95% interval. Errors against {record['reference']}, relative to its largest value.",
    )
    table.add_column("runtime")
    for name in ("p50 ms", "p90 ms", "p99 ms", "inputs/s", "file MB", "resident MB"):
        table.add_column(name, justify="right")
    for name in ("max abs error", "max rel error", "ratio"):
        table.add_column(name, justify="right")
    for name, row in record["candidates"].items():
        against = record["ratio"].get(name)
        table.add_row(
            f"{name} {row['version']}",
            *(f"{row[key]:.2f}" for key in ("p50_ms", "p90_ms", "p99_ms")),
            f"{row['throughput_per_second']:.1f}",
            _megabytes(row["file_bytes"]),
            _megabytes(row["resident_bytes"]),
            f"{row['max_abs_error']:.1e}",
            f"{row['max_rel_error']:.1e}" + ("" if row["agrees"] else " DIFFERS"),
            "" if against is None else str(Ratio(**against)),
        )
    return table


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"
