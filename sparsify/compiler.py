"""`compile`: the way of a model through the house, from top to bottom."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from sparsify.artefact.compilation import Compilation, Library
from sparsify.artefact.graphs import SavedProgram
from sparsify.artefact.trust import cache_directory
from sparsify.cache import find, keep, key_of
from sparsify.compiled import CompiledModel
from sparsify.config import CompileConfig
from sparsify.contracts import CostModel, MeasuredChoice, Pass, PassContext
from sparsify.frontend.causal_lm import (
    INPUTS,
    capture_causal_lm,
    is_causal_lm,
    normalise_causal_lm,
)
from sparsify.frontend.files import capture_file
from sparsify.frontend.torch import capture, normalise
from sparsify.generation import CompiledCausalLM, TextSettings
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
from sparsify.program import ProgramSet
from sparsify.report import Decision, Report
from sparsify.signature import CallSignature, parameters_of

if TYPE_CHECKING:
    from sparsify.codegen.target import Target

_ENTRY = "forward"
_BINDING = tuple(type(pass_) for pass_ in SPECIALISE)


def compile(
    model: torch.nn.Module | ExportedProgram | str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    shapes: Mapping[str, tuple[int | str | None, ...]] | None = None,
    constants: Mapping[str, Any] | None = None,
    target: str = "native",
    num_threads: int | None = None,
    dynamic_shapes: Any = "auto",
    recipe: Any = None,
    strict: bool = False,
    passes: str | Iterable[Pass] | None = None,
    disable: str | Iterable[str] = (),
    verify: str = "shapes",
    tune: str = "off",
    cache: bool = True,
    observer: Any = None,
) -> Any:
    """Compiles a model for one CPU; the result is called like the model.

    Only zeros that are there are used, and numbers stay as they are up to rounding, unless a
    ``recipe`` asks for more.

    A causal language model of transformers, given without example inputs, is compiled to generate
    text: the result is a `CompiledCausalLM`, else a `CompiledModel`.

    An ONNX file's inputs are the arguments, by position or by name (``input.1`` is ``input_1``),
    and the result of a call is a dict by the names of its outputs.

    Args:
        model: a float32 module on the CPU, an ExportedProgram, or the path of an ONNX file. It is
            not changed.
        example_inputs: a tuple of arguments, a dict of keyword arguments, or ``(args, kwargs)``;
            an ExportedProgram may bring its own, an ONNX file needs none, a language model that
            shall generate has none.
        shapes: of inputs of an ONNX file, by name, instead of those that it declares; a size is a
            number, or a name or None for a dynamic one.
        constants: of an ONNX file: values of inputs that then are no arguments any more, such as
            a sampling rate that decides which branch is taken.
        target: a target's name, see ``sparsify targets``.
        num_threads: threads of one call; None for one for each physical core.
        dynamic_shapes: ``"auto"`` (every size that can vary may), None (the sizes of the
            examples), or what ``torch.export.export`` takes.
        recipe: one recipe, or several in order. Pruning, such as ``Unstructured(0.8)``, is applied
            to a copy of the model; others are passes that rewrite its portable program.
        strict: raise, naming the place, rather than leave an operator to PyTorch or a layer of
            the recipe dense.
        passes: the pipeline, as text or passes; None for the standard one.
        disable: names of passes to leave out.
        verify: ``"numeric"`` also compares results after every pass.
        tune: ``"quick"`` times the few most promising layouts of each weight on this machine,
            ``"full"`` all candidates, and remembers the times beside the cache; ``"off"``
            chooses by prediction alone.
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
        tune=tune,  # type: ignore[arg-type]
        cache=cache,
        observer=observer,
    )
    builder = Builder.of(config)
    accounts: list[Any] = []
    if isinstance(model, str | os.PathLike):
        model = capture_file(model, example_inputs, shapes, constants, config.dynamic_shapes)
        example_inputs = None
    elif shapes is not None or constants is not None:
        raise TypeError(
            "shapes and constants are for ONNX files; give a PyTorch model example_inputs of the "
            "sizes wanted"
        )
    if config.model_recipes:
        model = copy.deepcopy(model)
        accounts = [recipe.apply(model) for recipe in config.model_recipes]
    if example_inputs is None and isinstance(model, torch.nn.Module) and is_causal_lm(model):
        if config.dynamic_shapes != "auto":
            raise ValueError(
                f"dynamic_shapes={config.dynamic_shapes!r}: the programs of a language model take "
                "any batch and length; leave it out, or pass example_inputs to compile the plain "
                "forward"
            )
        programs = capture_causal_lm(model)
        return compile_programs(
            builder,
            programs,
            lambda: normalise_causal_lm(programs),
            dict.fromkeys(programs, INPUTS),
            accounts,
            started,
            TextSettings.of(model),
        )
    exported = capture(model, example_inputs, config.dynamic_shapes)
    parameters = {_ENTRY: parameters_of(model, exported)}
    CallSignature(exported, parameters[_ENTRY])  # refuses arguments that a call could not give
    return compile_programs(
        builder, {_ENTRY: exported}, lambda: normalise(exported), parameters, accounts, started
    )


def compile_programs(
    builder: Builder,
    captured: Mapping[str, ExportedProgram],
    normal: Callable[[], ProgramSet],
    parameters: Mapping[str, tuple[str, ...]],
    accounts: Sequence[Any] = (),
    started: float | None = None,
    text: TextSettings | None = None,
) -> CompiledModel | CompiledCausalLM:
    """Compiles entry programs over one store of weights.

    Args:
        captured: each entry as its front end exported it, on which the compile cache is keyed.
        normal: makes the programs in normal form, one of each name in ``captured``; called only
            when no earlier compilation serves. Programs that were exported apart come together by
            `share_weights`.
        parameters: names of each entry's positional parameters, where they are known.
        accounts: what each recipe that changed the model did.
        started: when the work began, by ``time.perf_counter``.
        text: what a language model says about its text; the result then generates.
    """
    started = time.perf_counter() if started is None else started
    config = builder.config

    def build() -> Compilation:
        result = run_pipeline(
            normal(),
            builder.portable,
            PassContext(target=config.target, strict=config.strict),
            verify=config.verify,
            observer=config.observer,
        )
        borrowed = [
            tensor
            for exported in captured.values()
            for tensor in (*exported.state_dict.values(), *exported.constants.values())
            if isinstance(tensor, torch.Tensor)
        ]
        made = builder.specialise(result.programs, parameters, result.decisions, borrowed, text)
        if config.strict:
            _refuse_dense(accounts, made.report)
        return made

    identity = (*builder.identity, repr(dict(parameters)), repr(text))
    key = key_of(captured, config.digest(), *identity)
    watched = config.observer is not None or config.verify == "numeric"
    compilation = cached(key, build, config.cache and not watched)
    facts: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 3)}
    told = [account.to_dict() for account in accounts if hasattr(account, "to_dict")]
    if told:
        facts["recipe"] = told[0] if len(told) == 1 else told
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
        portable = (*passes[:split], *config.program_recipes)
        return cls(config, target, portable, tuple(passes[split:]), threads)

    @property
    def identity(self) -> tuple[str, ...]:
        """What a compilation depends on besides the model and the config's digest."""
        from sparsify.codegen.target import host_model

        # Times of one CPU are not those of another that runs the same code.
        measured_on = "" if self.config.tune == "off" else host_model()
        pipeline = pipeline_text(self.portable + self.binding)
        return (repr(self.target), pipeline, str(self.threads), measured_on)

    def specialise(
        self,
        portable: ProgramSet,
        parameters: Mapping[str, tuple[str, ...]],
        decisions: Iterable[Decision] = (),
        borrowed: Iterable[torch.Tensor] = (),
        text: TextSettings | None = None,
        measured: Mapping[str, MeasuredChoice] = {},
    ) -> Compilation:
        """Binds portable programs to the target, all at once, and compiles them.

        Args:
            parameters: names of each entry's positional parameters.
            borrowed: tensors of the caller's, which the compilation must not share.
            measured: choices of an earlier compilation for this target.
        """
        from sparsify.codegen.support import unsupported_reason

        context = PassContext(
            cost=self._cost(portable),
            target=self.target.name,
            strict=self.config.strict,
            measured=measured,
            unsupported=unsupported_reason,
        )
        result = run_pipeline(
            portable,
            self.binding,
            context,
            verify=self.config.verify,
            observer=self.config.observer,
        )
        return Compilation.of(
            tuple(map(SavedProgram.of, portable)),
            portable.weights,
            result.programs,
            result.programs.weights,
            borrowed,
            library=self._library(result.programs),
            target=self.config.target,
            features=self.target.features,
            pipeline=pipeline_text(self.binding),
            parameters=parameters,
            num_threads=self.config.num_threads,
            report=Report((*decisions, *result.decisions), self.target.name),
            text=None if text is None else text.to_dict(),
        )

    def _cost(self, portable: ProgramSet) -> CostModel:
        from sparsify.codegen.cost import CpuCostModel

        predicted = CpuCostModel.of(self.target, self.threads, portable)
        if self.config.tune == "off":
            return predicted
        from sparsify.codegen.measurements import Measurements
        from sparsify.codegen.tune import EFFORTS, TunedCostModel

        kept = Measurements(cache_directory() / "tuned" if self.config.cache else None)
        return TunedCostModel(predicted, EFFORTS[self.config.tune], kept)

    def _library(self, specialised: ProgramSet) -> Library | None:
        from sparsify.codegen.build import compile_library

        regions = [region for program in specialised for region in Plan.of(program).regions]
        entries = {region.name: region.program for region in regions if region.kind == "compiled"}
        if not entries:
            return None
        return Library(lambda path: compile_library(entries, self.target, path))


def cached(key: str, build: Callable[[], Compilation], use_cache: bool) -> Compilation:
    """The compilation of this key from the cache, else a new one, which the cache then holds."""
    found = find(key) if use_cache else None
    compilation = build() if found is None else found
    facts: dict[str, Any] = {"cached": found is not None}
    if use_cache and found is None:
        failure = keep(key, compilation)
        if failure is not None:
            facts["not_cached"] = failure
    report = compilation.report
    return replace(compilation, report=replace(report, facts={**report.facts, **facts}))


def run(compilation: Compilation) -> CompiledModel | CompiledCausalLM:
    """Loads a compilation's kernels into this process."""
    executor = None
    if compilation.library is not None:
        from sparsify.codegen.runtime.executor import Executor

        threads = compilation.num_threads or default_threads()
        executor = Executor(compilation.library.path, threads)
    model = CompiledModel(compilation, executor)
    if compilation.text is None:
        return model
    return CompiledCausalLM(model, TextSettings.from_dict(compilation.text))


def default_threads() -> int:
    """One for each physical core that this process may use."""
    from sparsify.codegen.runtime import pool

    return pool.default_threads()


def _refuse_dense(accounts: Iterable[Any], report: Report) -> None:
    pruned = {name for account in accounts for name in getattr(account, "names", ())}
    for decision in report.final():
        if decision.verdict == "dense" and pruned.intersection(member_names(decision.site)):
            raise ValueError(
                f"strict=True: {decision.site} of shape {decision.shape} was pruned by the recipe "
                f"but runs dense: {decision.reason}; prune it further, leave it out of the "
                "recipe, or compile with strict=False"
            )
