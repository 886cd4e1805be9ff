"""CausalConvWithState: the short convolution before the state of Mamba and Gated DeltaNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import Unsupported, operator


@operator("CausalConvWithState", since=27)
@operator("CausalConvWithState", domain="com.microsoft")
def causal_conv_with_state(
    node: Node,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    past: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each channel ``[batch, channels, length]`` with its own taps; also the last inputs."""
    before = weight.shape[-1] - 1
    joined = F.pad(x, [before, 0]) if past is None else torch.cat([past, x], -1)
    y = F.conv1d(joined, weight, bias, groups=x.shape[1])
    activation = node.get("activation", "none")
    if activation not in ("none", "", "silu", "swish"):
        raise Unsupported(f"the activation {activation}")
    y = F.silu(y) if activation in ("silu", "swish") else y
    return y, joined[..., joined.shape[-1] - before :]
