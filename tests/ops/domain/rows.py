"""Norms, rotary embeddings, gates and lanes."""

from collections.abc import Iterator

import torch

from sparsify.ops import ACTIVATIONS
from sparsify.ops.onnx.gated import gated
from sparsify.ops.onnx.lanes import FROM_LANES, TO_LANES
from sparsify.ops.onnx.norm import LAYER, RMS
from sparsify.ops.onnx.rotary import ROTARY
from tests.ops.domain.case import IN, TOKENS, Case, call, of


def cases() -> Iterator[Case]:
    for tokens in TOKENS:
        x, weight, bias = torch.randn(*tokens, IN) * 4 + 1, torch.rand(IN), torch.rand(IN)
        for operator, kind in ((LAYER, "layer"), (RMS, "rms")):
            shift = bias if kind == "layer" else None
            y = call("fused_norm", x, weight, shift, 1e-3, kind)
            inputs = of(operator, {"x": x, "weight": weight, "bias": bias})
            yield Case(operator, inputs, {"epsilon": 1e-3}, (y,))
        turns = {"x": x, "cos": torch.randn(*tokens, 4), "sin": torch.randn(*tokens, 4)}
        y = call("rotary", *turns.values(), 2, 4)
        yield Case(ROTARY, turns, {"heads": 2, "head_dim": 4}, (y,))
        lanes = call("to_lanes", x)
        yield Case(TO_LANES, {"x": x}, {}, (lanes,))
        yield Case(FROM_LANES, {"x": lanes, "leading": torch.tensor(tokens)}, {}, (x,))
        for activation in ACTIVATIONS:
            x = torch.randn(*tokens, 2 * IN)
            inputs = {"x": x}
            y = call("gated", x, activation)
            yield Case(gated(activation), inputs, {"activation": activation}, (y,))
