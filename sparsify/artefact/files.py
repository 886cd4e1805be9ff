"""Compiled models to files and back.

manifest.json              format, versions, target, decisions, size and SHA-256 of every part
portable/<entry>.json      an entry program bound to no target, as torch.export writes it
specialised/<entry>.json   the entry program as it runs, for this target
weights.safetensors        the weights of all entries in canonical form, dense or CSR, once each
kernels.so                 the compiled regions of all entries
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from sparsify.artefact.compilation import Compilation, Library
from sparsify.artefact.container import ArtefactError, Chunks, Container, check_fields
from sparsify.artefact.container import write as write_container
from sparsify.artefact.graphs import SavedProgram, checked
from sparsify.artefact.trust import is_ours, sign
from sparsify.artefact.weights import converted, forms, is_canonical, read, written
from sparsify.plan import mark, marks_of
from sparsify.program import ProgramSet, WeightStore
from sparsify.report import Report

_PORTABLE = "portable/{}.json"
_SPECIALISED = "specialised/{}.json"
_WEIGHTS = "weights.safetensors"
_KERNELS = "kernels.so"
_DISTRIBUTIONS = {"sparsify": "sparsify-compiler", "torch": "torch", "tvm": "apache-tvm"}


_FIELDS = {
    **dict.fromkeys(("target", "pipeline"), str),
    **dict.fromkeys(("versions", "entries", "report"), dict),
    "features": list,
    "num_threads": int | None,
    "text": dict | None,
}
_ENTRY_FIELDS = {"parameters": list, "regions": dict}


def versions() -> dict[str, str]:
    """The installed versions that a compilation depends on."""
    return {name: version(distribution) for name, distribution in _DISTRIBUTIONS.items()}


def write(compilation: Compilation, path: str | os.PathLike[str]) -> None:
    """Writes a compilation; the file is complete or untouched."""
    specialised = [SavedProgram.of(program) for program in compilation.specialised]
    parts: dict[str, Chunks] = {
        **{_PORTABLE.format(saved.name): [saved.data()] for saved in compilation.portable},
        **{_SPECIALISED.format(saved.name): [saved.data()] for saved in specialised},
        _WEIGHTS: written(compilation.canonical()),
    }
    if compilation.library is not None:
        parts[_KERNELS] = [compilation.library.path.read_bytes()]
    write_container(path, parts, lambda digests: _about(compilation, digests))


def _about(compilation: Compilation, digests: dict[str, str]) -> dict[str, Any]:
    entries = {
        program.name: {
            "parameters": list(compilation.parameters.get(program.name, ())),
            "regions": marks_of(program),
        }
        for program in compilation.specialised
    }
    about: dict[str, Any] = {
        "versions": versions(),
        "target": compilation.target,
        "features": list(compilation.features),
        "pipeline": compilation.pipeline,
        "num_threads": compilation.num_threads,
        "entries": entries,
        "report": compilation.report.to_dict(),
        "text": compilation.text,
    }
    return {**about, "signature": sign([about, digests])}


@dataclass(frozen=True)
class Contents:
    """An opened file of a compiled model; its parts are read when asked for.

    Attributes:
        trusted: whether the library may run, and types be imported by name.
    """

    container: Container
    trusted: bool

    @classmethod
    def open(cls, path: str | os.PathLike[str], trusted: bool | None) -> Contents:
        """``trusted=None`` trusts what this user's key has signed.

        Raises:
            FileNotFoundError, ArtefactError: see `Container`.
        """
        container = Container(path)
        if trusted is None:
            about = dict(container.about)
            signature = str(about.pop("signature", ""))
            trusted = is_ours([about, container.digests], signature)
        contents = cls(container, trusted)
        contents.explained(contents._check_fields)
        return contents

    def _check_fields(self) -> None:
        check_fields(self.container.about, _FIELDS, "its manifest")
        for name, entry in self.container.about["entries"].items():
            check_fields(entry, _ENTRY_FIELDS, f"the manifest's entry {name!r}")

    @property
    def target(self) -> str:
        return str(self.container.about["target"])

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(self.container.about["features"])

    @property
    def pipeline(self) -> str:
        return str(self.container.about["pipeline"])

    @property
    def entries(self) -> tuple[str, ...]:
        return tuple(self.container.about["entries"])

    @property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        entries = self.container.about["entries"]
        return {name: tuple(entry["parameters"]) for name, entry in entries.items()}

    @property
    def num_threads(self) -> int | None:
        count = self.container.about["num_threads"]
        return None if count is None else int(count)

    @property
    def report(self) -> Report:
        try:
            return Report.from_dict(self.container.about["report"])
        except (KeyError, TypeError, ValueError) as cause:
            raise self._error(f"its report cannot be read: {cause!r}") from cause

    @property
    def text(self) -> dict[str, Any] | None:
        """What a language model says about its text; None for other models."""
        text = self.container.about["text"]
        return None if text is None else dict(text)

    def outdated(self) -> str | None:
        """Why the library does not fit what is installed, or None."""
        built = self.container.about["versions"]
        wrong = [
            f"{n} {built.get(n)} (here {v})" for n, v in versions().items() if built.get(n) != v
        ]
        return f"it was built with {', '.join(wrong)}" if wrong else None

    def portable(self) -> ProgramSet:
        """The portable programs over their weights."""
        saved, weights = self._graphs(_PORTABLE), self._weights()
        self._require((name for program in saved for name in program.weight_names()), weights)
        return ProgramSet(tuple(program.program(weights) for program in saved))

    def specialised(self) -> ProgramSet:
        """The programs as they ran, without their weights."""
        return ProgramSet(tuple(saved.program({}) for saved in self._graphs(_SPECIALISED)))

    def compilation(self) -> Compilation:
        """The compilation as it was saved, its weights packed again."""
        library = None
        if _KERNELS in self.container.digests:
            library = Library.of(self.container.part(_KERNELS))
        hollow = self.specialised()
        stored = self._weights()
        wanted = hollow.weights
        weights = converted(wanted, stored, forms(hollow))
        self._require(wanted, weights)
        for program in hollow:
            regions = self.container.about["entries"][program.name]["regions"]
            mark(program, {node: (region, kind) for node, (region, kind) in regions.items()})
        return Compilation.of(
            self._graphs(_PORTABLE),
            stored,
            hollow,
            weights,
            library=library,
            target=self.target,
            features=self.features,
            pipeline=self.pipeline,
            parameters=self.parameters,
            num_threads=self.num_threads,
            report=self.report,
            text=self.text,
        )

    def _require(self, names: Iterable[str], weights: Mapping[str, torch.Tensor]) -> None:
        missing = [name for name in names if name not in weights]
        if missing:
            raise self._error(f"the weight {missing[0]!r} is missing")

    def _weights(self) -> WeightStore:
        # Packed forms are always made here: kernels do not check what they are given.
        weights = self.explained(lambda: read(self.container.part(_WEIGHTS)))
        return weights.keeping(name for name in weights if is_canonical(name))

    def _graphs(self, part: str) -> tuple[SavedProgram, ...]:
        return tuple(self._graph(part.format(name), name) for name in self.entries)

    def _graph(self, part: str, name: str) -> SavedProgram:
        data = bytes(self.container.part(part))
        return self.explained(lambda: checked(data, name, trusted=self.trusted))

    def explained(self, action: Any) -> Any:
        """What ``action`` returns; its errors name the file."""
        try:
            return action()
        except ArtefactError as cause:
            raise cause if str(self.container.path) in str(cause) else self._error(cause) from cause

    def _error(self, cause: object) -> ArtefactError:
        return ArtefactError(f"cannot load {self.container.path}: {cause}")
