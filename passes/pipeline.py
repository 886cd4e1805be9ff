"""Runs passes in order and checks the programs after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree

from sparsify.program import (
    Pass,
    PassContext,
    PassResult,
    Program,
    ProgramSet,
    VerifyLevel,
)
from sparsify.program import (
    verify as verify_program,
)
from sparsify.report import Decision

Observer = Callable[[Pass, ProgramSet, ProgramSet], None]
"""Called after each pass with the programs before and after it."""


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
    for pass_ in passes:
        result = pass_.run(programs, context)
        _check(pass_, programs, result.programs, verify)
        if observer is not None:
            observer(pass_, programs, result.programs)
        programs = result.programs
        decisions.extend(result.decisions)
        analysis.update(result.analysis)
    return PassResult(programs, tuple(decisions), analysis)


def _check(pass_: Pass, before: ProgramSet, after: ProgramSet, level: VerifyLevel) -> None:
    for program in after:
        try:
            verify_program(program)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"after pass {pass_.name!r}: {error}") from error
        if level == "numeric":
            error = largest_error(before[program.name], program)
            tolerance = getattr(pass_, "tolerance", 0.0)
            # Written so that a NaN fails.
            if not error <= tolerance:
                raise ValueError(
                    f"pass {pass_.name!r} changed the results of program {program.name!r}: error "
                    f"{error:.2e} of the output's scale on the example inputs, {tolerance:.0e} "
                    "is allowed"
                )


def largest_error(before: Program, after: Program) -> float:
    """Largest difference of any output on the example inputs, over that output's scale.

    NaN and infinite elements must agree in place. Infinite when structures or shapes differ.
    """
    if before.exported.example_inputs is None:
        raise ValueError(
            f"program {before.name!r} has no example inputs to compare results on; "
            "import it with example inputs"
        )
    args, kwargs = before.exported.example_inputs
    expected, structure = _pytree.tree_flatten(before.run(*args, **kwargs))
    found, other = _pytree.tree_flatten(after.run(*args, **kwargs))
    if structure != other:
        return float("inf")
    return max((_error(e, f) for e, f in zip(expected, found, strict=True)), default=0.0)


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
