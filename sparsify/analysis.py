"""How active a model's features are, of a model as it comes or of programs in any stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sparsify.calibration import Calibration
from sparsify.frontend.causal_lm import import_causal_lm, is_causal_lm
from sparsify.frontend.torch import import_torch
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.gating.analyze import ActivationAnalysis, analyze
from sparsify.program import Program, ProgramSet


def analyze_activations(
    model: Any, calibration: Calibration, sites: Iterable[str] = ("*",)
) -> ActivationAnalysis:
    """Which features of a model's activations are zero or negligible, site by site.

    Args:
        model: a causal language model of ``transformers``, for which the calibration holds token
            ids; any other ``nn.Module``, which the first batch of the calibration exports; a
            `Program` or a `ProgramSet` of portable programs.
        calibration: data to run.
        sites: shell patterns over names of linears.

    Raises:
        ValueError: there is no linear to look at.
    """
    if isinstance(model, Program):
        return analyze(model, calibration, sites)
    if isinstance(model, ProgramSet):
        programs = model
    elif is_causal_lm(model) and all(_is_text(batch) for batch in calibration.batches):
        programs = run_pipeline(import_causal_lm(model), PORTABLE).programs
    else:
        first = calibration.batches[0]
        example = ((), first) if isinstance(first, dict) else first
        programs = run_pipeline(import_torch(model, example), PORTABLE).programs
    name = "prefill" if "prefill" in programs.names else programs.names[0]
    return analyze(programs[name], calibration, sites)


def _is_text(batch: Any) -> bool:
    return isinstance(batch, tuple) and len(batch) == 1 and batch[0].dim() == 1
