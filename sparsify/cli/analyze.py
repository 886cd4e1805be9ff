"""``sparsify analyze``: where a model's zeros are, what they cost, and what they would gain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sparsify import ops
from sparsify.analysis import analyze_activations
from sparsify.bench import Machine
from sparsify.cli import options
from sparsify.cli.console import command, show, show_json, step
from sparsify.cli.data import read_calibration
from sparsify.cli.impose import Imposed, impose
from sparsify.cli.models import LoadedModel, load_to_compile, quiet
from sparsify.cli.onnx import OnnxOptions
from sparsify.contracts import CostModel, PassContext
from sparsify.layouts import Csr, Dense, Layout, WeightStats, parse
from sparsify.program import ProgramSet


@command
def analyze(
    model: options.Model,
    imposed: Annotated[
        float | None,
        typer.Option(
            "--impose",
            metavar="SPARSITY",
            help="Also zero this fraction of each weight at random, build its kernel, and time it "
            "against dense.",
        ),
    ] = None,
    activations: Annotated[
        bool,
        typer.Option(
            "--activations",
            help="Tell instead how active the features are that each linear reads, on --data.",
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Inputs for --activations: a .txt file, for a folder with a tokenizer, or arrays "
            "as .npy or .npz.",
        ),
    ] = None,
    target: options.Target = "native",
    threads: Annotated[int, typer.Option(min=1, help="Threads of one call.")] = 1,
    batch: options.Batch = None,
    seq: options.Seq = None,
    shape: options.Shape = None,
    constant: options.Constant = None,
    as_json: options.Json = False,
) -> None:
    """Tell for each linear layer of MODEL how sparse it is and what that is worth.

    With --activations: how many of the features that it reads are zero or negligible.
    """
    if imposed is not None and not 0 <= imposed < 1:
        raise ValueError(f"--impose {imposed} must be at least 0 and below 1")
    if activations and data is None:
        raise ValueError("--activations needs --data FILE to run the model on")
    with step(f"loading {model}"):
        loaded = load_to_compile(model, batch, seq, OnnxOptions.of(shape, constant))
    if activations and data is not None:
        with step("running the model"), quiet():
            found = analyze_activations(loaded.model, read_calibration(data, loaded))
        show_json({"model": model, **found.to_dict()}) if as_json else show(found.table())
        return
    with step("analysing"), quiet():
        sites, resolved = _sites(loaded, target, threads)
    if not sites:
        raise ValueError(f"{model}: has no linear layer to analyse")
    if imposed is not None:
        shapes = list(dict.fromkeys((tuple(s["shape"]), s["tokens"]) for s in sites))
        timed: dict[Any, Imposed] = {}
        for size, count in shapes:
            with step(f"timing {size[0]}x{size[1]} at {imposed:.0%}"), quiet():
                timed[size, count] = impose(size, count, imposed, target, threads)
        for site in sites:
            site["imposed"] = timed[tuple(site["shape"]), site["tokens"]].to_dict()
    record = {
        "model": model,
        "target": resolved,
        "threads": threads,
        "machine": Machine.here().to_dict(),
        "sites": sites,
    }
    if as_json:
        show_json(record)
    else:
        show(_table(record, imposed))


def _sites(loaded: LoadedModel, target: str, threads: int) -> tuple[list[dict[str, Any]], str]:
    """The portable pipeline, then the layout choice, exactly as a compilation runs them."""
    from sparsify.codegen.cost import CpuCostModel
    from sparsify.codegen.target import Target
    from sparsify.frontend.causal_lm import import_causal_lm
    from sparsify.frontend.torch import import_torch
    from sparsify.passes import PORTABLE, run_pipeline
    from sparsify.passes.analyze_weights import AnalyzeWeights
    from sparsify.passes.select_layout import SelectLayout

    resolved = Target.parse(target)
    if loaded.generates:
        programs = import_causal_lm(loaded.module)
    else:
        programs = import_torch(loaded.model, loaded.inputs, dynamic_shapes=None)
    portable = run_pipeline(programs, [*PORTABLE, AnalyzeWeights()])
    cost = CpuCostModel.of(resolved, threads, portable.programs)
    context = PassContext(cost=cost, target=resolved.name)
    bound = run_pipeline(portable.programs, [SelectLayout()], context)
    reasons = {d.site: d.reason for d in bound.decisions}
    uses = _uses(bound.programs)
    sites = [
        _describe(use, stats, reasons[site], cost)
        for site, stats in portable.analysis.items()
        for use in uses
        if use.site == site
    ]
    return sites, resolved.name


@dataclass(frozen=True)
class _Use:
    """A linear of one entry program: the rows it sees at the example's shapes, and its layout."""

    site: str
    program: str
    tokens: int
    layout: Layout


def _uses(programs: ProgramSet) -> list[_Use]:
    from sparsify.passes.graph import arguments, operand
    from sparsify.passes.sites import linear_site

    return [
        _Use(
            linear_site(program, node).name,
            program.name,
            ops.expected_tokens(operand(node).meta["val"]),
            parse(arguments(node)["layout"]),
        )
        for program in programs
        for node in program.graph.nodes
        if node.target in ops.LINEARS
    ]


def _describe(use: _Use, stats: WeightStats, reason: str, cost: CostModel) -> dict[str, Any]:
    from sparsify.passes.layout_times import LayoutTimes

    times = LayoutTimes(cost, stats, [use.tokens])
    layouts = (Dense(), Csr(), *cost.candidates(stats.shape, stats.nnz, use.tokens))
    return {
        "site": use.site,
        "program": use.program,
        "shape": list(stats.shape),
        "nnz": stats.nnz,
        "sparsity": 1 - stats.density,
        "occupancy": {f"{r}x{c}": value for (r, c), value in stats.occupancy.items()},
        "conformity": {f"{n}:{m}": value for (n, m), value in stats.conformity.items()},
        "dead_rows": stats.dead_rows,
        "dead_columns": stats.dead_columns,
        "bytes": {x.spec: x.estimate_nbytes(stats.shape, stats.nnz) for x in layouts},
        "tokens": use.tokens,
        "break_even_sparsity": break_even(cost, stats.shape, use.tokens),
        "verdict": "dense" if use.layout.is_dense else "sparse",
        "layout": use.layout.spec,
        "predicted_seconds": times.of(use.layout),
        "dense_seconds": times.of(times.dense),
        "reason": reason,
    }


def break_even(cost: CostModel, shape: tuple[int, int], tokens: int) -> float | None:
    """The least sparsity, to 1%, at which a sparse layout is predicted faster than dense.

    None when no sparse layout ever is.
    """
    elements = shape[0] * shape[1]
    for percent in range(101):
        nnz = round(elements * (100 - percent) / 100)
        times: dict[bool, list[float]] = {True: [], False: []}
        for layout in cost.candidates(shape, nnz, tokens):
            seconds = cost.linear_seconds(layout, shape, nnz, tokens)
            times[layout.is_dense].append(seconds)
        if times[False] and min(times[False]) < min(times[True], default=float("inf")):
            return percent / 100
    return None


def _table(record: dict[str, Any], imposed: float | None) -> Table:
    table = Table(
        title=f"{record['model']}: {record['target']}, {record['threads']} thread(s)",
        caption="1x4 ... 16x16: share of blocks that hold a nonzero; N:M: share of groups that "
        "conform; break-even: sparsity from which sparse is predicted faster than dense",
    )
    table.add_column("site", overflow="fold")
    several = len({s["program"] for s in record["sites"]}) > 1
    if several:
        table.add_column("program")
    table.add_column("shape")
    table.add_column("tokens", justify="right")
    blocks = list(record["sites"][0]["occupancy"])
    patterns = list(record["sites"][0]["conformity"])
    layouts = list(dict.fromkeys(_kind(spec) for s in record["sites"] for spec in s["bytes"]))
    sizes = [f"{layout.replace('_', ' ')} KB" for layout in layouts]
    for name in ("zeros", *blocks, *patterns, "dead rows/columns", *sizes):
        table.add_column(name, justify="right")
    table.add_column("break-even", justify="right")
    table.add_column("verdict")
    if imposed is not None:
        table.add_column(f"at {imposed:.0%}: us, dense us, ratio", justify="right")
    for s in record["sites"]:
        even = s["break_even_sparsity"]
        stored = {_kind(spec): f"{count / 1e3:.0f}" for spec, count in s["bytes"].items()}
        row = [
            s["site"],
            *([s["program"]] if several else []),
            "x".join(map(str, s["shape"])),
            str(s["tokens"]),
            f"{s['sparsity']:.1%}",
            *(f"{s['occupancy'][block]:.0%}" for block in blocks),
            *(f"{s['conformity'][pattern]:.0%}" for pattern in patterns),
            f"{s['dead_rows']}/{s['dead_columns']}",
            *(stored.get(layout, "") for layout in layouts),
            "never" if even is None else f"{even:.0%}",
            _verdict(s),
        ]
        if imposed is not None:
            t = s["imposed"]
            times = f"{t['sparse_seconds'] * 1e6:.0f}, {t['dense_seconds'] * 1e6:.0f}"
            row.append(f"{times}, {t['ratio']['median']:.2f}")
        table.add_row(*row)
    return table


def _kind(spec: str) -> str:
    """The layout's name without its parameters."""
    return spec.partition("{")[0]


def _verdict(site: dict[str, Any]) -> str:
    gain = site["dense_seconds"] / site["predicted_seconds"]
    return f"{site['verdict']}: {_kind(site['layout'])}, {gain:.1f}x dense"
