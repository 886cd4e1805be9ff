"""Constants of an ONNX model as parameters and buffers of a module, under their names in the file.

bert.encoder.layer.0.output.dense.weight   ->  the same
/decoder/Constant_1_output_0               ->  decoder.Constant_1_output_0
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from sparsify.frontend.onnx.values import Constant, untraced

_NUMBERED = re.compile(r"onnx::\w+|_?val_\d+|\d+")
"""Names that say no more than a number: PyTorch's exporters give them to weights they transpose."""


class Weights(nn.Module):
    """Holds each constant that a tensor meets, once for each form it is stored in.

    While `collecting`, constants that have a name become parameters (or buffers, if they are
    integers or hold infinities). Afterwards torch.export finds them as inputs of its graph; those
    that it meets for the first time it lifts under names of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collecting = False
        self._paths: dict[tuple[Constant, str], tuple[str, ...]] = {}

    def parameter(
        self,
        constant: Constant,
        variant: str = "",
        change: Callable[[torch.Tensor], torch.Tensor] | None = None,
        name: str = "",
    ) -> torch.Tensor:
        """See `Node.parameter`; ``name`` replaces that of a constant that exporters numbered."""
        path = self._paths.get((constant, variant))
        if path is not None:
            return self._at(path)
        with untraced():
            tensor = constant.tensor if change is None else change(constant.tensor)
        if self.collecting and constant.name:
            numbered = bool(name) and _NUMBERED.fullmatch(constant.name) is not None
            path = self._register(name if numbered else constant.name, tensor)
            self._paths[constant, variant] = path
            return self._at(path)
        return tensor

    def _at(self, path: tuple[str, ...]) -> torch.Tensor:
        module: nn.Module = self
        for part in path[:-1]:
            module = getattr(module, part)
        return getattr(module, path[-1])

    def _register(self, name: str, tensor: torch.Tensor) -> tuple[str, ...]:
        parts = [re.sub(r"\W", "_", part) for part in re.split(r"[./]", name) if part] or ["weight"]
        module: nn.Module = self
        for index, part in enumerate(parts[:-1]):
            parts[index] = part = self._free(module, part, modules=True)
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        parts[-1] = last = self._free(module, parts[-1])
        with untraced():
            if tensor.is_floating_point() and bool(torch.isfinite(tensor).all()):
                module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
            else:
                module.register_buffer(last, tensor)
        return tuple(parts)

    @staticmethod
    def _free(module: nn.Module, part: str, modules: bool = False) -> str:
        """The first of ``part``, ``part_1``, ... that is not taken."""
        name, count = part, 0
        while hasattr(module, name) and not (modules and name in module._modules):
            count += 1
            name = f"{part}_{count}"
        return name
