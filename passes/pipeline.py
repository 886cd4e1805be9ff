"""Runs passes in order and checks the programs after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.utils import _pytree

from sparsify.config import VerifyLevel
from sparsify.contracts import Pass, PassContext, PassResult
from sparsify.program import Program, ProgramSet
from sparsify.report import Decision
from sparsify.verification import verify as verify_program

Observer = Callable[[Pass, ProgramSet, ProgramSet], None]
"""Called after each pass with the programs before and after it."""

_Results = tuple[list[Any], _pytree.TreeSpec]


def run_pipeline(
    programs: ProgramSet,
    passes: Sequence[Pass],
    context: PassContext | None = None,
    *,
    verify: VerifyLevel = "shapes",
    observer: Observer | None = None,
) -> PassResult:
    """Applies the passes in order; gathers their decisions and analyses.

    Args:
        verify: ``"shapes"`` checks graph, signature and fake values after each pass;
            ``"numeric"`` also compares eager outputs on the example inputs.

    Raises:
        ValueError: naming the pass whose result is malformed, or differs from what came before by
            more than the pass's ``tolerance``, relative to the output's scale.
    """
    context = context or PassContext()
    decisions: list[Decision] = []
    analysis: dict[str, Any] = {}
    results = {p.name: _results(p) for p in programs} if verify == "numeric" else {}
    for pass_ in passes:
        result = pass_.run(programs, context)
        for program in result.programs:
            _check_shapes(pass_, program)
            if verify == "numeric":
                found = _results(program)
                _check_results(pass_, program, results[program.name], found)
                results[program.name] = found
        if observer is not None:
            observer(pass_, programs, result.programs)
        programs = result.programs
        decisions.extend(result.decisions)
        analysis.update(result.analysis)
    return PassResult(programs, tuple(decisions), analysis)


def largest_error(before: Program, after: Program) -> float:
    """Largest difference of any output on the example inputs, over that output's scale.

    NaN and infinite elements must agree in place. Infinite when structures or shapes differ.
    """
    return _distance(_results(before), _results(after))


def _check_shapes(pass_: Pass, program: Program) -> None:
    try:
        verify_program(program)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"after pass {pass_.name!r}: {error}") from error


def _check_results(pass_: Pass, program: Program, before: _Results, after: _Results) -> None:
    error = _distance(before, after)
    tolerance = getattr(pass_, "tolerance", 0.0)
    # Written so that a NaN fails.
    if not error <= tolerance:
        raise ValueError(
            f"pass {pass_.name!r} changed the results of program {program.name!r}: error "
            f"{error:.2e} of the output's scale on the example inputs, {tolerance:.0e} is allowed"
        )


def _results(program: Program) -> _Results:
    """The outputs and the state on the example inputs, flat, and their structure."""
    if program.exported.example_inputs is None:
        raise ValueError(
            f"program {program.name!r} has no example inputs to compare results on; "
            "import it with example inputs"
        )
    # Each run gets state of its own: a second one must find what the first one found.
    leaves, structure = _pytree.tree_flatten(program.exported.example_inputs)
    state = {node.name for node in program.state()}
    specs = program.exported.graph_signature.input_specs
    given = [spec.arg for spec in specs if spec.kind == InputKind.USER_INPUT]
    changed = [i for i, argument in enumerate(given) if argument.name in state]
    for i in changed:
        leaves[i] = leaves[i].clone()
    args, kwargs = _pytree.tree_unflatten(leaves, structure)
    outputs = program.run(*args, **kwargs)
    return _pytree.tree_flatten((outputs, [leaves[i] for i in changed]))


def _distance(before: _Results, after: _Results) -> float:
    if before[1] != after[1]:
        return float("inf")
    return max((_error(e, f) for e, f in zip(before[0], after[0], strict=True)), default=0.0)


def _error(expected: Any, found: Any) -> float:
    if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
        return 0.0 if expected == found else float("inf")
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, found) else float("inf")
    finite = expected.isfinite()
    if not torch.equal(expected[~finite].nan_to_num(), found[~finite].nan_to_num()):
        return float("inf")
    expected, found = expected[finite].double(), found[finite].double()
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((expected - found).abs().max() / scale)
