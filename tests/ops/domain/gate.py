"""Gates of every rule."""

from collections.abc import Iterator

import torch

from sparsify.ops.onnx.gate import gate
from tests.ops.domain.case import IN, TOKENS, Case, call

RULES: dict[str, dict[str, torch.Tensor]] = {
    "threshold": {"threshold": torch.tensor([0.7])},
    "channel_threshold": {"thresholds": torch.linspace(0.1, 1.5, IN)},
    "top_k{k=5}": {},
    "weighted_top_k{k=5}": {"importance": torch.linspace(0.1, 1.5, IN)},
    "statistical_top_k{k=5}": {},
}


def cases() -> Iterator[Case]:
    for tokens in TOKENS:
        for rule, parameters in RULES.items():
            x = torch.randn(*tokens, IN)
            operator, attributes = gate(rule, IN)
            y = call("gate", x, rule, list(parameters.values()))
            yield Case(operator, {"x": x, **parameters}, attributes, (y,))
