"""Programs to other homes than this process: bound to the target, checked, and written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.utils import _pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from sparsify.c_names import c_name, check_model_name
from sparsify.contracts import PassContext
from sparsify.passes import parse_pipeline, run_pipeline
from sparsify.passes.copy_results import CopyResults
from sparsify.plan import Plan
from sparsify.program import Program, ProgramSet
from sparsify.signature import CallSignature

if TYPE_CHECKING:
    from sparsify.codegen.emit.c.archive import ExportedEntry

Sizes = Mapping[str, Sequence[int]]
"""Input name -> the largest shape that the input may have."""
Initial = Mapping[str, torch.Tensor | np.ndarray | float]
"""Name of an input that is state -> its first value."""


def export_c(
    portable: ProgramSet,
    folder: Path,
    *,
    target: str,
    pipeline: str,
    name: str = "model",
    largest: Sizes | None = None,
    state: Mapping[str, str] | None = None,
    initial: Initial | None = None,
) -> None:
    """Writes a folder of C for a target; see `sparsify.CompiledModel.export_c`."""
    from sparsify.codegen.cost import CpuCostModel
    from sparsify.codegen.emit.c.archive import write_archive
    from sparsify.codegen.support import unsupported_reason
    from sparsify.codegen.target import Target

    check_model_name(name)
    chosen = Target.parse(target)
    chosen.tvm()  # refuses a wrong CPU before the passes run
    context = PassContext(
        cost=CpuCostModel.of(chosen, 1, portable),
        target=chosen.name,
        unsupported=unsupported_reason,
    )
    passes = (CopyResults(), *parse_pipeline(pipeline))
    result = run_pipeline(portable, passes, context)
    for decision in result.decisions:
        if decision.verdict == "unsupported":
            raise ValueError(
                f"export_c: {decision.site} of shape {decision.shape} cannot be compiled: "
                f"{decision.reason}; exported C has no PyTorch that could run it, so replace it"
            )
    bound = result.programs
    taken = {program.name: ", ".join(_inputs(program)) for program in bound}
    unknown = sorted(set(largest or {}).difference(*map(_inputs, bound)))
    if unknown:
        shown = "; ".join(f"entry {entry!r} takes {names}" for entry, names in taken.items())
        raise ValueError(f"export_c: largest names {', '.join(unknown)}, but {shown}")
    entries = {program.name: _entry(program, largest or {}, state or {}) for program in bound}
    first = {c_name(name): torch.as_tensor(value) for name, value in (initial or {}).items()}
    held = dict.fromkeys(name for entry in entries.values() for name in entry.state)
    stateless = [name for name in initial or {} if c_name(name) not in held]
    if stateless:
        raise ValueError(
            f"export_c: initial names {', '.join(stateless)}, but the state of the model is "
            f"{', '.join(held) or 'empty; say what it remembers by state={...}'}"
        )
    about = ", ".join(bound.names)
    write_archive(folder, entries, chosen, name=name, about=about, initial=first)


def _entry(program: Program, largest: Sizes, state: Mapping[str, str]) -> ExportedEntry:
    from sparsify.codegen.emit.c.archive import ExportedEntry

    plan = Plan.of(program)
    if len(plan.regions) != 1 or plan.regions[0].kind != "compiled":
        kinds = ", ".join(f"{region.name} ({region.kind})" for region in plan.regions)
        raise ValueError(
            f"export_c: entry {program.name!r} runs in the parts {kinds or 'none'}; exported C has "
            "no PyTorch, so all must be compiled in one piece"
        )
    region = plan.regions[0]
    names = [output.name for output in plan.outputs]
    lost = [i for i, name in enumerate(names) if name not in region.outputs]
    if lost:
        raise ValueError(
            f"export_c: entry {program.name!r}: result {lost[0]} is a number, or an input that "
            "the model changes in place; leave it out of the results"
        )
    given = {n: node for n, node in _inputs(program).items() if node.name in region.inputs}
    inputs = {c_name(n): region.inputs.index(node.name) for n, node in given.items()}
    if len(inputs) < len(given):
        raise ValueError(
            f"export_c: entry {program.name!r}: the inputs {', '.join(given)} have names that C "
            "cannot tell apart; rename the arguments of the model"
        )
    results: dict[str, int] = {}
    for index, (name, title) in enumerate(zip(names, _result_names(program), strict=True)):
        free = title if title is not None and title not in results else f"output_{index}"
        results[free] = region.outputs.index(str(name))
    held = _held(program, inputs, results, state)
    outputs: dict[str, int] = {}
    remembered = set(map(c_name, state.values()))
    for title, place in results.items():
        if title not in remembered and place not in outputs.values():  # twice is written once
            outputs[title] = place
    ranges = _ranges(program, largest)
    for name, node in given.items():
        if c_name(name) in held:  # what is kept from run to run keeps its shape
            fixed = [size for size in map(str, node.meta["val"].shape) if size in ranges]
            ranges |= {size: (ranges[size][1], ranges[size][1]) for size in fixed}
    return ExportedEntry(
        region.program,
        {name: place for name, place in inputs.items() if name not in held},
        outputs,
        ranges,
        held,
    )


def _held(
    program: Program,
    inputs: Mapping[str, int],
    results: Mapping[str, int],
    state: Mapping[str, str],
) -> dict[str, tuple[int, int | None]]:
    """Inputs that outlive a run, as `ExportedEntry.state`: changed in place, or in ``state``."""
    nodes = _inputs(program)
    held: dict[str, tuple[int, int | None]] = {
        c_name(name): (inputs[c_name(name)], None)
        for name, node in nodes.items()
        if node in program.state()
    }
    for name, title in state.items():
        where = f"export_c: state {{{name!r}: {title!r}}}: entry {program.name!r} has no"
        place, new = inputs.get(c_name(name)), results.get(c_name(title))
        if place is None:
            raise ValueError(f"{where} input {name!r}; its inputs are {', '.join(inputs)}")
        if new is None:
            raise ValueError(f"{where} result {title!r}; its results are {', '.join(results)}")
        held[c_name(name)] = (place, new)
    return held


def _inputs(program: Program) -> dict[str, fx.Node]:
    """The tensors that a program takes, by the names of its arguments, in order."""
    nodes = [n for n in program.user_inputs() if isinstance(n.meta["val"], torch.Tensor)]
    tensors = CallSignature(program.exported).tensors
    return {tensor.name: node for tensor, node in zip(tensors, nodes, strict=True)}


def _ranges(program: Program, largest: Sizes) -> dict[str, tuple[int, int]]:
    """Least and most of each size, the most from ``largest``, else from the example inputs."""
    ranges: dict[str, tuple[int, int]] = {}
    inputs = _inputs(program)
    for name, node in inputs.items():
        shape = node.meta["val"].shape
        given = largest.get(name)
        if given is not None and len(given) != len(shape):
            raise ValueError(f"export_c: largest[{name!r}] {tuple(given)} needs {len(shape)} sizes")
        for dim, extent in enumerate(shape):
            if not isinstance(extent, torch.SymInt) or not extent.node.expr.is_symbol:
                continue
            symbol = extent.node.expr
            allowed = program.exported.range_constraints.get(symbol, ValueRanges(1, int_oo))
            least = max(1, int(allowed.lower))
            known = ranges.get(str(symbol), (least, 0))[1]
            most = given[dim] if given is not None else known or optimization_hint(extent, 0)
            if given is None and not most:
                raise ValueError(
                    f"export_c: no example tells how large dim {dim} of input {name!r} can be; "
                    f"say it: largest={{{name!r}: ...}}, or --largest {name}=..."
                )
            if most < least or (allowed.upper != int_oo and most > allowed.upper):
                raise ValueError(
                    f"export_c: dim {dim} of input {name!r} is {most} at most, but the model "
                    f"takes {least} to {allowed.upper}"
                )
            ranges[str(symbol)] = (least, max(known, most) if given is None else most)
    return ranges


def _result_names(program: Program) -> list[str | None]:
    """Names of the results where the model returns them by name."""
    spec = program.exported.call_spec.out_spec
    assert spec is not None
    tree: Any = _pytree.tree_unflatten(range(spec.num_leaves), spec)
    names: list[str | None] = []
    for path, _ in _pytree.tree_flatten_with_path(tree)[0]:
        keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        named = [key for key in keys if key]
        names.append(c_name("_".join(named)) if named else None)
    return names
