"""`load`: a compiled model from its file, on this machine or another."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparsify.artefact.choices import is_tuned, measured_choices
from sparsify.artefact.compilation import Compilation
from sparsify.artefact.files import Contents
from sparsify.cache import key_of
from sparsify.compiled import CompiledModel
from sparsify.compiler import Builder, cached, run
from sparsify.config import CompileConfig
from sparsify.contracts import MeasuredChoice
from sparsify.generation import CompiledCausalLM, TextSettings
from sparsify.passes import pipeline_text
from sparsify.report import Notice, Report


def load(
    path: str | os.PathLike[str],
    *,
    trusted: bool | None = None,
    target: str | None = None,
    num_threads: int | None = None,
) -> Any:
    """Reads a model that `CompiledModel.save` wrote.

    The file holds a shared library, which is code. Where it may not or cannot run, the kernels
    are built again from the rest of the file, which is data only and checked as such; a warning
    says so. Layouts that were chosen by measuring stay, unless it is for another target, of which
    a warning tells too. The compile cache keeps what was built.

    Args:
        trusted: True runs the file's library; use it for files from people you trust. False never
            does. None, the default, runs it if this user saved the file (see
            `sparsify.artefact.trust`).
        target: build for another target than the file's.
        num_threads: threads of one call; None for the number that was compiled with.

    Returns:
        What was saved: a `CompiledModel`, or a `CompiledCausalLM`.

    Raises:
        FileNotFoundError: no such file.
        ArtefactError: no file of sparsify, of another format version, truncated, damaged, or
            incomplete.
        RuntimeError: this CPU lacks a feature that the kernels use.
    """
    contents = Contents.open(path, trusted)
    text = None
    if contents.text is not None:
        text = contents.explained(lambda: TextSettings.from_dict(contents.text))
    reason = contents.outdated()
    if target is not None and target != contents.target:
        reason = None
    elif not contents.trusted:
        reason = "it was not saved by this user (trusted=True uses the kernels in the file)"
        reason = reason if trusted is None else None
    elif reason is None:
        compilation = contents.compilation()
        _check_host(contents)
        return run(replace(compilation, num_threads=num_threads or compilation.num_threads))
    if reason is not None:
        warnings.warn(f"{path}: the kernels are built again, {reason}", Notice, stacklevel=2)
    config = CompileConfig(
        target=target or contents.target,
        num_threads=num_threads or contents.num_threads,
        passes=contents.pipeline,
    )
    builder = Builder.of(config)
    report, measured = contents.report, {}
    if is_tuned(report):
        if report.target == builder.target.name:
            measured = measured_choices(contents.specialised(), report)
        else:
            warnings.warn(
                f"{path}: its layouts were measured for target {report.target!r} and are predicted "
                f"for {builder.target.name!r}; compile the model there with tune= to measure",
                Notice,
                stacklevel=2,
            )
    return _rebuilt(contents, builder, text, measured)


def _rebuilt(
    contents: Contents,
    builder: Builder,
    text: TextSettings | None,
    measured: Mapping[str, MeasuredChoice],
) -> CompiledModel | CompiledCausalLM:
    programs = contents.portable()
    decided = {pass_.name for pass_ in builder.binding}
    decisions = [d for d in contents.report if d.made_by not in decided]
    key = key_of(
        {program.name: program.exported for program in programs},
        *builder.identity,
        repr(contents.parameters),
        repr(contents.text),
        pipeline_text(builder.binding),
        Report(tuple(decisions)).to_json(),
        repr(sorted(measured.items())),
    )

    def build() -> Compilation:
        return builder.specialise(
            programs, contents.parameters, decisions, text=text, measured=measured
        )

    return run(cached(key, build, True))


def _check_host(contents: Contents) -> None:
    from sparsify.codegen.target import host_features

    missing = sorted(set(contents.features) - host_features())
    if missing:
        raise RuntimeError(
            f"cannot load {contents.container.path}: its kernels for target {contents.target!r} "
            f"use the CPU features {', '.join(missing)}, which this machine lacks; "
            "load(path, target='native') builds them for this machine"
        )
