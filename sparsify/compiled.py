"""The compiled model: called like the module it was made from, or entry by entry."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sparsify.artefact.compilation import Compilation
from sparsify.artefact.files import write
from sparsify.engine import Executor
from sparsify.entry import Entry
from sparsify.plan import Plan
from sparsify.program import Program, ProgramSet
from sparsify.report import Report

if TYPE_CHECKING:
    import numpy as np
    import torch

    from sparsify.codegen.emit.onnx import OnnxSummary


class CompiledModel:
    """A model compiled for one target; call it like the module it was made from.

    A model of several entries, such as ``prefill`` and ``decode``, is called through `entry`; they
    run over one copy of the weights. Results are torch tensors without autograd. Calls from
    several threads may overlap. Make one with `sparsify.compile` or `sparsify.load`.
    """

    def __init__(self, compilation: Compilation, executor: Executor | None) -> None:
        self._compilation = compilation
        weights = compilation.specialised.weights
        self._entries = {
            program.name: Entry(
                program, weights, compilation.parameters.get(program.name, ()), executor
            )
            for program in compilation.specialised
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model.

        Raises:
            TypeError: a missing, unknown or repeated argument, a wrong type or dtype.
            ValueError: a wrong shape, size, device or constant, or several entries to choose from.
        """
        return self._only_entry(*args, **kwargs)

    @property
    def entries(self) -> tuple[str, ...]:
        """The names of the entries; ``forward`` alone for a module."""
        return tuple(self._entries)

    def entry(self, name: str) -> Entry:
        """An entry, to be called.

        Raises:
            ValueError: there is no entry of this name.
        """
        if name not in self._entries:
            raise ValueError(f"the model has no entry {name!r}, it has {', '.join(self.entries)}")
        return self._entries[name]

    @property
    def _only_entry(self) -> Entry:
        if len(self._entries) > 1:
            names = " and ".join(self.entries)
            raise ValueError(f"the model has the entries {names}; choose by model.entry(name)")
        return next(iter(self._entries.values()))

    @property
    def report(self) -> Report:
        """What was decided at each site, and why."""
        return self._compilation.report

    @property
    def graph(self) -> str:
        """The programs that run, as text."""
        if len(self._entries) == 1:
            return self._only_entry.graph
        return "\n\n".join(f"{name}:\n{entry.graph}" for name, entry in self._entries.items())

    @property
    def plan(self) -> Plan:
        """The regions in which the program runs; each of several entries has a plan of its own."""
        return self._only_entry.plan

    @property
    def portable(self) -> Program:
        """The program before it was bound to a target: PyTorch runs it, exporters read it.

        Its weights are unpacked for it, so it takes as much memory again.
        """
        return self.portable_programs[self._only_entry.name]

    @property
    def portable_programs(self) -> ProgramSet:
        """Like `portable`, for all entries."""
        weights = self._compilation.canonical()
        return ProgramSet(tuple(saved.program(weights) for saved in self._compilation.portable))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory, which all entries share."""
        return self._compilation.specialised.weights.adding(self._compilation.kept).nbytes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to one file, for `sparsify.load`.

        Raises:
            OSError: the place cannot be written; nothing is left there.
            ArtefactError: a type of the model's inputs or outputs cannot be named in a file.
        """
        write(self._compilation, path)

    def export_c(
        self,
        directory: str | os.PathLike[str],
        *,
        target: str | None = None,
        name: str = "model",
        largest: Mapping[str, Sequence[int]] | None = None,
        state: Mapping[str, str] | None = None,
        initial: Mapping[str, torch.Tensor | np.ndarray | float] | None = None,
    ) -> None:
        """Writes a folder of C that runs the model without Python, PyTorch or TVM.

        The program is bound to the target anew, which may be another CPU than this machine's. Sizes
        that vary here vary there too, up to the largest, which fix the size of the workspace.

        Args:
            target: a target's name, see ``sparsify targets``; None for the one compiled for.
            name: begins the names of files and functions.
            largest: the largest shape of inputs, by name; of others, that of the example inputs.
            state: inputs that the C program remembers from run to run, each with the name of the
                result that is its next value. Inputs that the model changes in place are state
                anyway. State has its largest shape.
            initial: first values of state, by the input's name: a number, or what broadcasts to the
                state's shape. Other state is zero at first, and after a reset.

        Raises:
            UnknownTarget: a ValueError that lists the targets, CPUs or features there are.
            ValueError: the model runs in PyTorch in part, is too large for the target, or a size
                is out of range.
            OSError: the place cannot be written. After any error the folder is as it was.
        """
        from sparsify.export import export_c

        export_c(
            self.portable_programs,
            Path(directory),
            target=target or self._compilation.target,
            pipeline=self._compilation.pipeline,
            name=name,
            largest=largest,
            state=state,
            initial=initial,
        )

    def export_onnx(
        self, path: str | os.PathLike[str], *, standard: bool = False, entry: str | None = None
    ) -> OnnxSummary:
        """Writes the portable program as an ONNX file of opset 18.

        Operators of ours are nodes of the domain ``sparsify`` whose function bodies are standard
        operators: any ONNX Runtime runs the file. Weights are stored sparse, without loss. State
        goes in and comes out as ``new_<name>``. Over 2 GB, weights are in ``<path>.data``.

        Args:
            standard: write no operators of ours, and dense weights.
            entry: which of several entries.

        Returns:
            What was written: bytes, nodes, and how each weight was stored.

        Raises:
            ValueError: operators that ONNX does not have, all by name; or there are several
                entries to choose from.
            OSError: the place cannot be written; nothing is left there.
            ModuleNotFoundError: onnx or onnxscript is not installed.
        """
        from sparsify.codegen.emit.onnx import export

        name = (self._only_entry if entry is None else self.entry(entry)).name
        return export(self.portable_programs[name], self.report, Path(path), standard=standard)

    def __repr__(self) -> str:
        entries = self._entries.values()
        kinds = [region.kind for entry in entries for region in entry.plan.regions]
        return (
            f"CompiledModel({', '.join(map(str, entries))}, target={self.report.target!r}, "
            f"regions: {kinds.count('compiled')} compiled, {kinds.count('torch')} in PyTorch)"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a CompiledModel holds machine code and threads, so it cannot be pickled or copied; "
            "write it with model.save(path) and read it with sparsify.load(path), or share the "
            "one object: calls from several threads may overlap"
        )
