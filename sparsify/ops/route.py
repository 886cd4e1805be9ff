"""Which experts each token goes to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsify.ops.library import declare
from sparsify.routers import Routes, parse


def _fake(logits: torch.Tensor, router: str, parameters: Sequence[torch.Tensor]) -> Routes:
    rule = parse(router)
    width = logits.shape[1]
    rule.check(width, parameters)
    shape = (logits.shape[0], rule.slots(rule.experts(width)))
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape)


@declare("route(Tensor logits, str router, Tensor[] parameters) -> (Tensor, Tensor)", _fake)
def route(logits: torch.Tensor, router: str, parameters: Sequence[torch.Tensor]) -> Routes:
    """The experts of each token and their weights.

    Args:
        logits: ``[tokens, width]``.
        router: a router's spec, ``softmax_top_k{k=2,normalise=1}``.
        parameters: the router's tensors, in the order of ``Router.parameters``.

    Returns:
        Experts, int32, and weights, both ``[tokens, slots]``; an unused slot has the expert -1 and
        the weight 0.
    """
    rule = parse(router)
    rule.check(logits.shape[1], parameters)
    experts, weights = rule.route(logits, *parameters)
    return experts.contiguous(), weights.contiguous()
