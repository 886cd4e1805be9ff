"""`compile`: the way of a model through the house, from top to bottom."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from sparsify.artefact.compilation import Compilation, Library
from sparsify.artefact.graphs import SavedProgram
from sparsify.cache import find, keep, key_of
from sparsify.compiled import CompiledModel
from sparsify.config import CompileConfig
from sparsify.frontend.torch import capture, normalise
from sparsify.passes import (
    PORTABLE,
    SPECIALISE,
    parse_pipeline,
    pipeline_text,
    run_pipeline,
    without,
)
from sparsify.passes.sites import member_names
from sparsify.plan import Plan
from sparsify.program import Pass, PassContext, Program, ProgramSet
from sparsify.report import Decision, Report
from sparsify.signature import CallSignature, parameters_of

if TYPE_CHECKING:
    from sparsify.codegen.target import Target

_ENTRY = "forward"
_BINDING = tuple(type(pass_) for pass_ in SPECIALISE)


def compile(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    target: str = "native",
    num_threads: int | None = None,
    dynamic_shapes: Any = "auto",
    recipe: Any = None,
    strict: bool = False,
    passes: str | Iterable[Pass] | None = None,
    disable: str | Iterable[str] = (),
    verify: str = "shapes",
    cache: bool = True,
    observer: Any = None,
) -> CompiledModel:
    """Compiles a model for one CPU; the result is called like the model.

    Only zeros that are there are used, and numbers stay as they are up to rounding, unless a
    ``recipe`` asks for more.

    Args:
        model: a float32 module on the CPU, or an ExportedProgram. It is not changed.
        example_inputs: a tuple of arguments, a dict of keyword arguments, or ``(args, kwargs)``;
            an ExportedProgram may bring its own.
        target: a target's name, see ``sparsify targets``.
        num_threads: threads of one call; None for one for each physical core.
        dynamic_shapes: ``"auto"`` (every size that can vary may), None (the sizes of the
            examples), or what ``torch.export.export`` takes.
        recipe: applied to a copy of the model first, such as ``Unstructured(0.8)``.
        strict: raise, naming the place, rather than leave an operator to PyTorch or a layer of
            the recipe dense.
        passes: the pipeline, as text or passes; None for the standard one.
        disable: names of passes to leave out.
        verify: ``"numeric"`` also compares results after every pass.
        cache: reuse an earlier compilation; they are in ``$SPARSIFY_CACHE_DIR``, by default
            ``~/.cache/sparsify``. With an observer or numeric verification, all passes run.
        observer: called with each pass and the programs before and after it.

    Raises:
        TypeError, ValueError: what is wrong with the options, the model, or the examples.
        RuntimeError: this machine cannot run the target's code.
    """
    started = time.perf_counter()
    config = CompileConfig(
        target=target,
        num_threads=num_threads,
        dynamic_shapes=dynamic_shapes,
        recipe=recipe,
        strict=strict,
        passes=passes if passes is None or isinstance(passes, str) else tuple(passes),
        disable=disable if isinstance(disable, str) else tuple(disable),  # type: ignore[arg-type]
        verify=verify,  # type: ignore[arg-type]
        cache=cache,
        observer=observer,
    )
    builder = Builder.of(config)
    account = None
    if config.recipe is not None:
        model = copy.deepcopy(model)
        account = config.recipe.apply(model)
    exported = capture(model, example_inputs, config.dynamic_shapes)
    parameters = parameters_of(model, exported)
    CallSignature(exported, parameters)  # refuses arguments that a call could not give

    def build() -> Compilation:
        programs = normalise(exported)
        result = run_pipeline(
            programs,
            builder.portable,
            PassContext(target=config.target, strict=config.strict),
            verify=config.verify,
            observer=config.observer,
        )
        mine = [t for t in exported.state_dict.values() if isinstance(t, torch.Tensor)]
        mine += [t for t in exported.constants.values() if isinstance(t, torch.Tensor)]
        made = builder.specialise(result.programs, parameters, result.decisions, mine)
        if config.strict and account is not None:
            _refuse_dense(account, made.report)
        return made

    key = key_of(exported, config.digest(), *builder.identity, *parameters)
    watched = config.observer is not None or config.verify == "numeric"
    compilation = cached(key, build, config.cache and not watched)
    facts = {"seconds": round(time.perf_counter() - started, 3)}
    if account is not None and hasattr(account, "to_dict"):
        facts["recipe"] = account.to_dict()
    report = compilation.report
    return run(replace(compilation, report=replace(report, facts={**report.facts, **facts})))


@dataclass(frozen=True)
class Builder:
    """What turns portable programs into code for one target."""

    config: CompileConfig
    target: Target
    portable: tuple[Pass, ...]
    binding: tuple[Pass, ...]
    threads: int

    @classmethod
    def of(cls, config: CompileConfig) -> Builder:
        """Raises for an unknown target or pass, and for a machine that cannot run the target."""
        from sparsify.codegen.target import Target

        target = Target.parse(config.target)
        target.check_host()
        passes = config.passes
        if passes is None:
            passes = (*PORTABLE, *SPECIALISE)
        elif isinstance(passes, str):
            passes = parse_pipeline(passes)
        passes = without(passes, config.disable)
        first = [isinstance(pass_, _BINDING) for pass_ in passes]
        split = first.index(True) if True in first else len(passes)
        threads = config.num_threads or default_threads()
        return cls(config, target, tuple(passes[:split]), tuple(passes[split:]), threads)

    @property
    def identity(self) -> tuple[str, ...]:
        """What a compilation depends on besides the model and the config's digest."""
        return (repr(self.target), pipeline_text(self.portable + self.binding), str(self.threads))

    def specialise(
        self,
        portable: ProgramSet,
        parameters: tuple[str, ...],
        decisions: Iterable[Decision] = (),
        borrowed: Iterable[torch.Tensor] = (),
    ) -> Compilation:
        """Binds a portable program to the target and compiles it.

        Args:
            borrowed: tensors of the caller's, which the compilation must not share.
        """
        from sparsify.codegen.cost import CpuCostModel
        from sparsify.codegen.support import unsupported_reason

        context = PassContext(
            cost=CpuCostModel(self.target, self.threads),
            target=self.target.name,
            strict=self.config.strict,
            unsupported=unsupported_reason,
        )
        result = run_pipeline(
            portable,
            self.binding,
            context,
            verify=self.config.verify,
            observer=self.config.observer,
        )
        specialised, source = result.programs[_ENTRY], portable[_ENTRY]
        return Compilation.of(
            SavedProgram.of(source),
            source.weights,
            specialised,
            specialised.weights,
            borrowed,
            library=self._library(specialised),
            target=self.config.target,
            features=self.target.features,
            pipeline=pipeline_text(self.binding),
            parameters=parameters,
            num_threads=self.config.num_threads,
            report=Report((*decisions, *result.decisions), self.target.name),
        )

    def _library(self, specialised: Program) -> Library | None:
        from sparsify.codegen.build import compile_library

        regions = Plan.of(specialised).regions
        entries = {region.name: region.program for region in regions if region.kind == "compiled"}
        if not entries:
            return None
        return Library(lambda path: compile_library(entries, self.target, path))


def cached(key: str, build: Any, use_cache: bool) -> Compilation:
    """The compilation of this key from the cache, else a new one, which the cache then holds."""
    found = find(key) if use_cache else None
    compilation: Compilation = build() if found is None else found
    facts: dict[str, Any] = {"cached": found is not None}
    if use_cache and found is None:
        failure = keep(key, compilation)
        if failure is not None:
            facts["not_cached"] = failure
    report = compilation.report
    return replace(compilation, report=replace(report, facts={**report.facts, **facts}))


def run(compilation: Compilation) -> CompiledModel:
    """Loads a compilation's kernels into this process."""
    if compilation.library is None:
        return CompiledModel(compilation, None)
    from sparsify.codegen.runtime.executor import Executor

    threads = compilation.num_threads or default_threads()
    return CompiledModel(compilation, Executor(compilation.library.path, threads))


def default_threads() -> int:
    """One for each physical core that this process may use."""
    from sparsify.codegen.runtime import pool

    return pool.default_threads()


def _refuse_dense(account: Any, report: Report) -> None:
    pruned = set(getattr(account, "names", ()))
    for decision in report.final():
        if decision.verdict == "dense" and pruned.intersection(member_names(decision.site)):
            raise ValueError(
                f"strict=True: {decision.site} of shape {decision.shape} was pruned by the recipe "
                f"but runs dense: {decision.reason}; prune it further, leave it out of the "
                "recipe, or compile with strict=False"
            )
