"""What a compiled model is made of, apart from what runs it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsify.artefact.graphs import SavedProgram, with_weights
from sparsify.artefact.weights import can_convert, converted, forms, is_canonical
from sparsify.memory import contiguous_copy, in_place
from sparsify.program import ProgramSet, WeightStore
from sparsify.report import Report


class Library:
    """A shared library of kernels in a temporary file, which goes when nothing uses it."""

    def __init__(self, fill: Callable[[Path], None]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sparsify-")
        self.path = Path(self._folder.name) / "kernels.so"
        fill(self.path)

    @classmethod
    def of(cls, data: bytes | memoryview) -> Library:
        def fill(path: Path) -> None:
            path.write_bytes(data)

        return cls(fill)


@dataclass(frozen=True)
class Compilation:
    """All that a compiled model is made of, and all that its file holds.

    Attributes:
        portable: the entry programs before they were bound to a target, without their weights.
        specialised: those that run, over one store of packed weights, their regions marked.
        kept: weights of the portable programs that the packed ones do not give back.
        library: kernels with one entry for each compiled region of any program; None when there
            is none.
        target: name of the target as asked for; ``report.target`` is the one it stands for.
        features: CPU features that the kernels use.
        pipeline: the specialising passes as text, to build again from the portable programs.
        text: what a language model says about its text, plain values; None for other models.
        parameters: names of each entry's positional parameters, those of ``forward`` for a module.
    """

    portable: tuple[SavedProgram, ...]
    specialised: ProgramSet
    kept: WeightStore
    library: Library | None
    target: str
    features: tuple[str, ...]
    pipeline: str
    parameters: Mapping[str, tuple[str, ...]]
    num_threads: int | None
    report: Report
    text: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        portable: tuple[SavedProgram, ...],
        canonical: Mapping[str, torch.Tensor],
        specialised: ProgramSet,
        packed: Mapping[str, torch.Tensor],
        borrowed: Iterable[torch.Tensor] = (),
        **rest: Any,
    ) -> Compilation:
        """Keeps the packed weights, and of the canonical ones what those do not give back.

        Args:
            borrowed: tensors that the caller may change later; those kept are copied.
        """
        foreign = frozenset(tensor.untyped_storage().data_ptr() for tensor in borrowed)
        owned = _owned(packed, foreign)
        specialised = ProgramSet(tuple(with_weights(program, owned) for program in specialised))
        mine, known = specialised.weights, forms(specialised)
        kept = {
            name: canonical[name]
            for saved in portable
            for name in saved.weight_names()
            if not can_convert(name, mine, known)
        }
        return cls(portable, specialised, WeightStore(_owned(kept, foreign)), **rest)

    def canonical(self) -> WeightStore:
        """The weights as files hold them: those of the portable programs, unpacked again."""
        mine = self.specialised.weights.adding(self.kept)
        known = forms(self.specialised)
        names = dict.fromkeys(name for saved in self.portable for name in saved.weight_names())
        weights = converted(names, mine, known)
        rest = {n: t for n, t in mine.items() if n not in weights and is_canonical(n)}
        return weights.adding(rest)


def _owned(weights: Mapping[str, torch.Tensor], foreign: frozenset[int]) -> dict[str, torch.Tensor]:
    """Weights in memory of our own, where kernels can read them without another copy."""
    return {
        name: tensor
        if in_place(tensor) and tensor.untyped_storage().data_ptr() not in foreign
        else contiguous_copy(tensor.detach())
        for name, tensor in weights.items()
    }
