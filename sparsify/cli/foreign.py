"""``sparsify benchmark`` for another machine: instructions counted here, or times of a device."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sparsify.bench import flat_tensors, relative_error, split_inputs
from sparsify.bench.foreign import Device, Emulated
from sparsify.cli.benchmark_reference import Reference
from sparsify.cli.console import show, show_json, step
from sparsify.cli.source import Source
from sparsify.codegen.target import Target

PROXIES = "proxies for speed, no times: instructions of one run in an emulator"


def benchmark_elsewhere(
    source: Source, target: Target, device: str | None, rounds: int, tolerance: float, as_json: bool
) -> bool:
    """Shows what one run of the exported model takes on ``device``, or of instructions without one.

    Returns whether its outputs agree with the reference.
    """
    if source.is_compiled or source.generates:
        raise ValueError(
            f"{source.text}: for another machine, name a model with example inputs, not a compiled "
            "file or a language model"
        )
    inputs = source.loaded.inputs
    tensors = flat_tensors(split_inputs(inputs))
    names = [f"input{i}.npy" for i in range(len(tensors))]
    spec = dict(target.spec)
    record: dict[str, Any] = {"model": source.loaded.name, "target": target.name}
    record["inputs"] = [list(tensor.shape) for tensor in tensors]
    with tempfile.TemporaryDirectory(prefix="sparsify-") as name:
        folder = Path(name)
        # Before anything takes long.
        emulated = None if device else Emulated.of(target.machine, str(spec["mcpu"]))
        with step(f"exporting for {target.name}"):
            source.export_c(folder, target=target.name, name="model")
        for path, tensor in zip(names, tensors, strict=True):
            np.save(folder / path, tensor.numpy())
        if emulated is None:
            with step(f"running on {device}"):
                times = Device(str(device)).time(folder, names, rounds)
            low, *_, high = statistics.quantiles(times, n=10)
            p50 = statistics.median(times) * 1e3
            record |= {"device": device, "runs": len(times), "p50_ms": p50}
            record |= {"p10_ms": low * 1e3, "p90_ms": high * 1e3}
            show_json(record) if as_json else show(_times(record))
            return True
        with step("counting instructions"):
            program = emulated.build(folder)
            counts = emulated.count(program, [*names, "-o", "out.npy"])
        import torch

        reference = Reference.of(source.loaded.module, inputs)
        found = torch.from_numpy(np.load(folder / "out.npy"))
        error = relative_error((found,), reference.outputs[:1])[1]
    record |= {"proxies": PROXIES, "instructions": counts.to_dict()}
    record["inner_loops"] = [
        {
            "turns": loop.runs,
            "instructions": len(loop.text),
            "predicted_cycles": emulated.cycles(loop),
        }
        for loop in counts.loops
    ]
    record |= {"reference": reference.name, "max_rel_error": error, "agrees": error <= tolerance}
    show_json(record) if as_json else show(*_proxies(record))
    return bool(record["agrees"])


def _title(record: dict[str, Any]) -> str:
    shapes = ", ".join("x".join(map(str, shape)) for shape in record["inputs"])
    return f"{record['model']}, inputs {shapes}, for {record['target']}"


def _times(record: dict[str, Any]) -> Table:
    table = Table(title=f"{_title(record)}, on {record['device']}, 1 thread")
    columns = ("runs", "p10_ms", "p50_ms", "p90_ms")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_row(str(record["runs"]), *(f"{record[name]:.3f}" for name in columns[1:]))
    return table


def _proxies(record: dict[str, Any]) -> tuple[Table, Table]:
    counts = record["instructions"]
    classes = Table(
        title=f"{_title(record)}\n{record['proxies']}",
        caption=f"fma: multiply-adds; vector: other vector instructions. Error of the first output "
        f"against {record['reference']}: {record['max_rel_error']:.1e}"
        + ("" if record["agrees"] else " DIFFERS"),
    )
    for name in counts:
        classes.add_column(name, justify="right")
    classes.add_row(*(f"{count:,}" for count in counts.values()))
    loops = Table(
        title="inner loops that most instructions are in",
        caption="cycles of one turn as llvm-mca predicts them, all loads in the first-level cache; "
        "none where there is no llvm-mca",
    )
    for name in ("turns", "instructions of a turn", "of all", "predicted cycles"):
        loops.add_column(name, justify="right")
    for loop in record["inner_loops"]:
        part = loop["turns"] * loop["instructions"] / counts["all"]
        cycles = loop["predicted_cycles"]
        loops.add_row(
            f"{loop['turns']:,}",
            str(loop["instructions"]),
            f"{part:.1%}",
            "" if cycles is None else f"{cycles:.1f}",
        )
    return classes, loops
