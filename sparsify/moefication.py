"""`moefy`: a trained dense model as a program of mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

from sparsify.calibration import Calibration
from sparsify.frontend.torch import import_torch
from sparsify.passes import PORTABLE, run_pipeline
from sparsify.passes.moefy import Moefy


def moefy(
    model: torch.nn.Module | ExportedProgram, experts: int, top_k: int, calibration: Any
) -> ExportedProgram:
    """The model with its feed-forward networks split into experts, of which a token runs some.

    The result is compiled, exported or run like any exported program. To see what was done to each
    network, and for language models that generate, compile the model with the recipe `Moefy`.

    Args:
        model: a float32 module on the CPU. It is not changed.
        experts: of one network.
        top_k: experts that a token runs; the multiplications are ``top_k / experts`` of the dense
            ones.
        calibration: a `Calibration`, or batches for one; the first is the example input.

    Raises:
        TypeError, ValueError: what is wrong with the options, the model, or the calibration.
    """
    if not isinstance(calibration, Calibration):
        calibration = Calibration(calibration)
    recipe = Moefy(experts, top_k, calibration)
    first = calibration.batches[0]
    examples = ((), dict(first)) if isinstance(first, Mapping) else (tuple(first), {})
    result = run_pipeline(import_torch(model, examples), (*PORTABLE, recipe))
    (program,) = result.programs
    return program.exported
