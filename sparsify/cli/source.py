"""A model to export: from what MODEL and its options name, rewritten or compiled when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsify.cli.compile import compile_loaded
from sparsify.cli.console import step
from sparsify.cli.models import LoadedModel, load_to_compile, quiet
from sparsify.cli.onnx import OnnxOptions
from sparsify.contracts import Pass, PassResult


@dataclass(frozen=True)
class Source:
    """MODEL as it was typed, and the options that say how to load it."""

    text: str
    batch: int | None = None
    seq: int | None = None
    onnx: OnnxOptions = field(default_factory=OnnxOptions)

    @property
    def is_compiled(self) -> bool:
        return Path(self.text).suffix == ".sparsify"

    def input_names(self) -> dict[str, str]:
        """What the inputs of an ONNX file are called there, by the names of its arguments."""
        return self.onnx.inputs(self.text) if Path(self.text).suffix == ".onnx" else {}

    def compiled(self) -> Any:
        """The model out of its .sparsify file, or compiled for this machine."""
        if not self.is_compiled:
            return compile_loaded(self.loaded())
        import sparsify

        given = {"--batch": self.batch, "--seq": self.seq, "--shape, --constant": self.onnx or None}
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"{self.text}: {option} does not apply to a compiled model")
        with step(f"loading {self.text}"):
            return sparsify.load(self.text)

    def loaded(self) -> LoadedModel:
        with step(f"loading {self.text}"):
            return load_to_compile(self.text, self.batch, self.seq, self.onnx)

    def rewritten(self, passes: Sequence[Pass] | None = None, verify: Any = "shapes") -> PassResult:
        """The programs after these passes, by default the portable ones; no kernel is made.

        A language model that generates has the programs ``prefill`` and ``decode``.
        """
        from sparsify.frontend.causal_lm import import_causal_lm
        from sparsify.frontend.torch import import_torch
        from sparsify.passes import PORTABLE, run_pipeline

        loaded = self.loaded()
        with step(f"rewriting {self.text}"), quiet():
            imported = (
                import_causal_lm(loaded.module)
                if loaded.generates
                else import_torch(loaded.model, loaded.inputs)
            )
            return run_pipeline(imported, PORTABLE if passes is None else passes, verify=verify)
