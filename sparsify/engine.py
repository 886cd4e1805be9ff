"""Runs a plan: compiled regions by an executor, the others by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from sparsify.plan import Output, Plan, Region

Values = tuple[Any, ...]


class Executor(Protocol):
    """Runs the entries of a library of kernels."""

    def bind(
        self, entry: str, weights: Sequence[torch.Tensor]
    ) -> Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]: ...


@dataclass(frozen=True)
class _Step:
    call: Callable[[Sequence[Any]], Values]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last: tuple[str, ...]
    """Values that nothing reads after this step."""


class Engine:
    """A plan bound to its weights; may be called from several threads at once."""

    def __init__(
        self, plan: Plan, weights: Mapping[str, torch.Tensor], executor: Executor | None
    ) -> None:
        self._inputs = tuple(name for name in plan.inputs if name is not None)
        self._outputs = plan.outputs
        self._weights = weights
        kept = {output.name for output in plan.outputs}
        self._steps: list[_Step] = []
        for region in reversed(plan.regions):
            last = tuple({*region.inputs, *region.outputs} - kept)
            kept.update(last)
            call = _bound(region, weights, executor)
            self._steps.insert(0, _Step(call, region.inputs, region.outputs, last))

    def __call__(self, tensors: Sequence[torch.Tensor], sizes: Mapping[Any, int]) -> list[Any]:
        values: dict[str, Any] = dict(zip(self._inputs, tensors, strict=True))
        for step in self._steps:
            made = step.call([values[name] for name in step.inputs])
            values.update(zip(step.outputs, made, strict=True))
            for name in step.last:
                del values[name]
        return [self._result(output, values, sizes) for output in self._outputs]

    def _result(self, output: Output, values: Mapping[str, Any], sizes: Mapping[Any, int]) -> Any:
        if output.name is not None:
            return values[output.name]
        if output.weight is not None:
            return self._weights[output.weight].detach().clone()
        if output.size is not None:
            return int(sympy.sympify(output.size).subs(sizes))
        return output.constant


def _bound(
    region: Region, weights: Mapping[str, torch.Tensor], executor: Executor | None
) -> Callable[[Sequence[Any]], Values]:
    names = region.program.weight_names.values()
    mine = [weights[name] for name in names]
    if region.kind == "compiled":
        if executor is None:
            raise ValueError(f"{region.name} is compiled, but there is no library of kernels")
        return executor.bind(region.name, mine)
    module = fx.GraphModule(torch.nn.Module(), region.program.graph)

    def run(inputs: Sequence[Any]) -> Values:
        with torch.no_grad():
            return tuple(module(*mine, *inputs))

    return run
