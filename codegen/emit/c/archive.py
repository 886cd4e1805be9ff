"""A folder of C that runs a model: tables, kernels as one object file, weights, and a runtime.

model.h  model.c          what a user calls, and the tables behind it
model_kernels.o           see `sparsify.codegen.emit.objects`
model.weights             packed for the target; model_weights.S makes them part of a program
sparsify.[ch] ...         runs the tables: a few hundred lines, the same for every model
main.c  CMakeLists.txt    a program that runs the model on .npy files
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
import tvm

from sparsify.codegen.build import kernel_passes
from sparsify.codegen.emit.c.arena import ALIGNMENT, Bounds, plan
from sparsify.codegen.emit.c.scratch import scratch_bytes
from sparsify.codegen.emit.c.state import StateLayout
from sparsify.codegen.emit.c.straight import ExportError, StraightCode, straighten
from sparsify.codegen.emit.c.tables import Tables, Tabulator
from sparsify.codegen.emit.c.weights import Weights
from sparsify.codegen.emit.objects import compile_object, entry_symbol
from sparsify.codegen.lower import lower
from sparsify.codegen.target import Target
from sparsify.program import Program

_HERE = Path(__file__).parent
_POOL = _HERE.parents[1] / "runtime"
_TOOLCHAINS = {
    "aarch64": "aarch64-linux-gnu",
    "armv7l": "arm-linux-gnueabihf",
    "riscv64": "riscv64-linux-gnu",
}


_ADDRESSED = {"armv7l": 2**31, "wasm32": 2**31}
"""Bytes that a program can have in one piece, by machine; others are bound by the tables."""
_LARGEST_OFFSET = ALIGNMENT * 2**32


@dataclass(frozen=True)
class ExportedEntry:
    """An entry to export.

    Attributes:
        program: specialised, to be compiled in one piece.
        inputs, outputs: places in the program by C name, in the order of the C functions.
        ranges: least and most value of each size that inputs bring, by its symbol's name.
        state: by C name the place of an input that outlives a run, and that of the output which is
            its next value, or None where kernels change it in place.
    """

    program: Program
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    ranges: Mapping[str, tuple[int, int]]
    state: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)


def write_archive(
    folder: Path,
    entries: Mapping[str, ExportedEntry],
    target: Target,
    *,
    name: str,
    about: str,
    initial: Mapping[str, torch.Tensor],
) -> None:
    """Writes the folder's files; all of them, or, after an error, none.

    Args:
        name: begins the names of files and symbols; a C identifier.
        about: the model in a few words, for the header.
        initial: first values of state, by its names; of other state, zero.

    Raises:
        ExportError: a program needs what C cannot give it, or more memory than the target has.
        ObjectError, UnknownTarget: see `compile_object`.
    """
    programs = {f"{name}_{entry}": each.program for entry, each in entries.items()}
    with target.tvm():
        module = tvm.transform.Sequential(kernel_passes(target))(lower(programs, target))
    codes = {entry: straighten(module, f"{name}_{entry}") for entry in entries}
    for entry, each in entries.items():
        codes[entry].arrange(
            tuple(each.inputs.values()), tuple(each.outputs.values()), tuple(each.state.values())
        )
    weights = Weights()
    places = {entry: weights.add(codes[entry], each.program) for entry, each in entries.items()}
    state = StateLayout()
    kernels = dict.fromkeys(kernel for code in codes.values() for kernel in code.kernels())
    symbols = {kernel: f"{name}_{kernel}" for kernel in kernels}
    called = {kernel: entry_symbol(symbol) for kernel, symbol in symbols.items()}
    sources = [
        _source(entry, each, codes[entry], places[entry], state, module, called)
        for entry, each in entries.items()
    ]
    first = [
        (state.tensors[which].offset, *weights.place(f"initial:{which}", state.begin(which, value)))
        for which, value in initial.items()
    ]
    facts = {
        "name": name,
        "NAME": name.upper(),
        "about": about,
        "target": target.name,
        "toolchain": _TOOLCHAINS.get(target.machine),
        "elf": target.machine != "wasm32",
        "entries": sources,
        "suffix": lambda entry: f"_{entry.name}" if len(sources) > 1 else "",
        "kernels": sorted(called.values()),
        "identity": list(weights.identity()),
        "weights_bytes": weights.nbytes,
        "state": list(state.tensors.values()),
        "initial": first,
        "state_bytes": max(ALIGNMENT, state.nbytes),
        "workspace_bytes": max(ALIGNMENT, *(entry.workspace_bytes for entry in sources)),
        "scratch_bytes": max(ALIGNMENT, *(entry.scratch_bytes for entry in sources)),
    }
    _check_memory(target, sources, weights.nbytes, state.nbytes)
    functions = {symbol: module[kernel] for kernel, symbol in symbols.items()}
    with _filled(folder) as made:
        compile_object(functions, target, made / f"{name}_kernels.o")
        weights.write(made / f"{name}.weights")
        _write_sources(made, name, facts)


@contextlib.contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files are moved to ``folder`` when all have been written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder if folder.is_dir() else folder.parent  # which may be another file system's
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=beside) as made:
        yield Path(made)
        folder.mkdir(exist_ok=True)
        for file in sorted(Path(made).iterdir()):
            os.replace(file, folder / file.name)


def _check_memory(target: Target, sources: Sequence[_Source], weights: int, state: int) -> None:
    """Refuses what the target's addresses cannot reach."""
    limit = _ADDRESSED.get(target.machine, _LARGEST_OFFSET)
    for source in sources:
        tensors = (*source.tables.inputs, *source.tables.outputs)
        parts = {
            "intermediate results": source.workspace_bytes,
            "inputs and outputs": sum(spec.nbytes for spec in tensors),
            "the state": state,
            "the weights": weights,
        }
        if sum(parts.values()) < limit:
            continue
        sizes = ", ".join(f"{symbol} = {most}" for symbol, _, most in source.ranges)
        shown = ", ".join(f"{what} {nbytes / 2**20:,.0f} MiB" for what, nbytes in parts.items())
        raise ExportError(
            f"entry {source.name!r} takes more than the {limit / 2**30:g} GiB that programs for "
            f"{target.name!r} can use, with {sizes or 'its sizes'}: {shown}; give smaller largest "
            "shapes, by largest={...} or --largest"
        )


@dataclass(frozen=True)
class _Source:
    """What the templates say about an entry.

    Attributes:
        ranges: ``(symbol, least, most)``.
    """

    name: str
    tables: Tables
    calls: tuple[tuple[str | None, int, int], ...]
    ranges: tuple[tuple[str, int, int], ...]
    workspace_bytes: int
    scratch_bytes: int
    stateful: bool

    @property
    def parameters(self) -> str:
        """The tensors that the C function takes; an array of none is no C."""
        inputs, outputs = len(self.tables.inputs), len(self.tables.outputs)
        given = f"inputs[{inputs}]" if inputs else "*inputs"
        made = f"outputs[{outputs}]" if outputs else "*outputs"
        return f"const sparsify_tensor {given}, sparsify_tensor {made}"


def _source(
    entry: str,
    each: ExportedEntry,
    code: StraightCode,
    offsets: Sequence[int],
    state: StateLayout,
    module: tvm.IRModule,
    called: Mapping[str, str],
) -> _Source:
    bounds = Bounds(code, each.ranges)
    arena = plan(code, bounds)
    names = tuple(each.inputs), tuple(each.outputs)
    held = state.add(code, tuple(each.state), bounds)
    tables = Tabulator(code, bounds, arena, offsets, held).tables(*names)
    return _Source(
        entry,
        tables,
        tuple((k and called[k], first, count) for k, first, count in tables.calls),
        tuple((symbol, *each.ranges[symbol]) for symbol in code.symbols()),
        arena.nbytes,
        scratch_bytes(module, code, bounds),
        bool(held),
    )


def _write_sources(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    loader = jinja2.FileSystemLoader(_HERE / "templates")
    templates = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for template in templates.list_templates():
        if template == "model_weights.S.j2" and not facts["elf"]:
            continue
        file = template.removesuffix(".j2").replace("model", name)
        (folder / file).write_bytes(templates.get_template(template).render(facts).encode())
    for source in (*sorted((_HERE / "runtime").iterdir()), _POOL / "pool.c", _POOL / "wait.h"):
        shutil.copyfile(source, folder / source.name)


__all__ = ["ExportError", "ExportedEntry", "write_archive"]
