"""A model to export: from what MODEL and its options name, rewritten or compiled when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

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

    @property
    def generates(self) -> bool:
        """Whether it is a language model that is compiled to generate text."""
        if not self.is_compiled:
            return self.loaded.generates
        import sparsify

        return isinstance(self.compiled, sparsify.CompiledCausalLM)

    @cached_property
    def compiled(self) -> Any:
        """The model out of its .sparsify file."""
        import sparsify

        given = {"--batch": self.batch, "--seq": self.seq, "--shape, --constant": self.onnx or None}
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"{self.text}: {option} does not apply to a compiled model")
        with step(f"loading {self.text}"):
            return sparsify.load(self.text)

    @cached_property
    def loaded(self) -> LoadedModel:
        with step(f"loading {self.text}"):
            return load_to_compile(self.text, self.batch, self.seq, self.onnx)

    def export_c(self, folder: Path, *, target: str | None, name: str, **options: Any) -> None:
        """Writes C; a compiled model brings its target, another needs no kernels for this machine.

        Args:
            options: ``max_tokens`` of a language model; ``largest``, ``state`` and ``initial`` of
                another.
        """
        if self.is_compiled:
            self.compiled.export_c(folder, target=target, name=name, **options)
            return
        from sparsify.export import export_c
        from sparsify.generation.causal_lm import cache_shape
        from sparsify.generation.paged_cache import largest_shapes
        from sparsify.generation.text_settings import TextSettings
        from sparsify.ops import CHUNK_TOKENS
        from sparsify.passes import SPECIALISE, pipeline_text

        programs = self.rewritten().programs
        if self.generates:
            most = options["max_tokens"] or TextSettings.of(self.loaded.module).max_positions
            state = {n.name: n.meta["val"].shape for each in programs for n in each.state()}
            shape = cache_shape(state.pop("keys"))
            beside = {name: tuple(s[2:]) for name, s in state.items() if name != "values"}
            options = {"largest": largest_shapes(shape, 1, most, CHUNK_TOKENS, beside)}
        export_c(
            programs,
            folder,
            target=target or "native",
            pipeline=pipeline_text(SPECIALISE),
            name=name,
            **options,
        )

    def rewritten(self, passes: Sequence[Pass] | None = None, verify: Any = "shapes") -> PassResult:
        """The programs after these passes, by default the portable ones; no kernel is made.

        A language model that generates has the programs ``prefill`` and ``decode``.
        """
        from sparsify.frontend.causal_lm import import_causal_lm
        from sparsify.frontend.torch import import_torch
        from sparsify.passes import PORTABLE, run_pipeline

        loaded = self.loaded
        with step(f"rewriting {self.text}"), quiet():
            imported = (
                import_causal_lm(loaded.module)
                if loaded.generates
                else import_torch(loaded.model, loaded.inputs)
            )
            return run_pipeline(imported, PORTABLE if passes is None else passes, verify=verify)
