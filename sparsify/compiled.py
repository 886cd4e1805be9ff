"""The compiled model: called like the module it was made from."""

from __future__ import annotations

import os
from typing import Any, NoReturn

from sparsify.artefact.compilation import Compilation
from sparsify.artefact.files import write
from sparsify.engine import Engine, Executor
from sparsify.plan import Plan
from sparsify.program import Program
from sparsify.report import Report
from sparsify.signature import CallSignature


class CompiledModel:
    """A model compiled for one target; call it like the module it was made from.

    Results are torch tensors without autograd. Calls from several threads may overlap. Make one
    with `sparsify.compile` or `sparsify.load`.
    """

    def __init__(self, compilation: Compilation, executor: Executor | None) -> None:
        self._compilation = compilation
        program = compilation.specialised
        self._plan = Plan.of(program)
        self._engine = Engine(self._plan, program.exported.state_dict, executor)
        self._signature = CallSignature(program.exported, compilation.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model.

        Raises:
            TypeError: a missing, unknown or repeated argument, a wrong type or dtype.
            ValueError: a wrong shape, size, device or constant.
        """
        tensors, sizes = self._signature.bind(args, kwargs)
        return self._signature.results(self._engine(tensors, sizes))

    @property
    def report(self) -> Report:
        """What was decided at each site, and why."""
        return self._compilation.report

    @property
    def graph(self) -> str:
        """The program that runs, as text."""
        return str(self._compilation.specialised.graph)

    @property
    def plan(self) -> Plan:
        """The regions in which the program runs."""
        return self._plan

    @property
    def portable(self) -> Program:
        """The program before it was bound to a target: PyTorch runs it, exporters read it.

        Its weights are unpacked for it, so it takes as much memory again.
        """
        return self._compilation.portable.program(self._compilation.canonical())

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return self._compilation.specialised.weights.adding(self._compilation.kept).nbytes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to one file, for `sparsify.load`.

        Raises:
            OSError: the place cannot be written; nothing is left there.
            ArtefactError: a type of the model's inputs or outputs cannot be named in a file.
        """
        write(self._compilation, path)

    def __repr__(self) -> str:
        kinds = [region.kind for region in self._plan.regions]
        return (
            f"CompiledModel(forward{self._signature}, target={self.report.target!r}, regions: "
            f"{kinds.count('compiled')} compiled, {kinds.count('torch')} in PyTorch)"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a CompiledModel holds machine code and threads, so it cannot be pickled or copied; "
            "write it with model.save(path) and read it with sparsify.load(path), or share the "
            "one object: calls from several threads may overlap"
        )
