"""What a model must be before it is compiled: float32 weights on the CPU, all of them numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

_FLOATS = (torch.float64, torch.float16, torch.bfloat16)


def check_weights(
    parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]
) -> None:
    """Refuses weights that the compiler cannot use.

    Raises:
        ValueError: naming the first weight that is not on the CPU, not dense, not float32, or
            holds NaN or (a parameter) infinite values. Buffers may hold infinities: masks do.
    """
    for name, tensor in {**parameters, **buffers}.items():
        where = f"weight {name!r} of shape {tuple(tensor.shape)}"
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{where} is on device {tensor.device}; compilation reads weights from the CPU: "
                "call model.cpu() first"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else str(tensor.layout)
            raise ValueError(
                f"{where} is stored as {kind}; give it dense (zeros included), the compiler "
                "chooses the storage"
            )
        if tensor.dtype in _FLOATS or tensor.is_complex():
            raise ValueError(
                f"{where} is {tensor.dtype}; floating-point weights must be torch.float32: "
                "call model.float() first"
            )
        if not tensor.is_floating_point():
            continue
        broken = ~torch.isfinite(tensor) if name in parameters else torch.isnan(tensor)
        count = int(broken.sum())
        if count:
            raise ValueError(
                f"{where} holds {count} NaN or infinite value{'s' if count > 1 else ''} of "
                f"{tensor.numel()}; repair the checkpoint (torch.nan_to_num) or load another one"
            )
