"""Gates: features that a rule does not keep become exact zeros, which linears then skip."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsify.gates import parse
from sparsify.ops.library import declare


def _fake(
    x: torch.Tensor, rule: str, parameters: Sequence[torch.Tensor], lanes: bool = False
) -> torch.Tensor:
    features = x.shape[1 if lanes else -1]
    parse(rule).check(int(features), parameters)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@declare("gate(Tensor x, str rule, Tensor[] parameters, bool lanes=False) -> Tensor", _fake)
def gate(
    x: torch.Tensor, rule: str, parameters: Sequence[torch.Tensor], lanes: bool = False
) -> torch.Tensor:
    """``x`` where the rule keeps a feature, 0 elsewhere.

    Args:
        x: ``[..., features]``, or ``[groups, features, 16]`` with ``lanes``.
        rule: the spec of a gate, ``threshold`` or ``top_k{k=512}``.
        parameters: the gate's tensors, in the order of ``Gate.parameters``.

    Returns:
        A tensor like ``x``.

    Raises:
        ValueError: the rule is unknown, or does not work on so many features or such parameters.
    """
    found = parse(rule)
    rows = x.transpose(1, 2) if lanes else x
    found.check(rows.shape[-1], parameters)
    kept = torch.where(found.keep(rows, *parameters), rows, torch.zeros_like(rows))
    return (kept.transpose(1, 2) if lanes else kept).contiguous()
