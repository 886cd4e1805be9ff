"""Times a sparsity that a weight does not have yet."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsify.bench import Ratio, interleave, ratio, relative_error
from sparsify.bench import threads as bound_threads

_ROUNDS = 12
_SECONDS = 0.05
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Imposed:
    """One shape at a hypothetical sparsity, as measured: row-major in and out, both sides alike.

    Attributes:
        ratio: time of sparse over dense, with its interval.
        max_rel_error: of the sparse result against float64.
    """

    sparsity: float
    layout: str
    sparse_seconds: float
    dense_seconds: float
    ratio: Ratio
    max_rel_error: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "sparsity": self.sparsity,
            "layout": self.layout,
            "sparse_seconds": self.sparse_seconds,
            "dense_seconds": self.dense_seconds,
            "ratio": self.ratio.to_dict(),
            "max_rel_error": self.max_rel_error,
        }


def impose(
    shape: tuple[int, int], tokens: int, sparsity: float, target: str, threads: int
) -> Imposed:
    """Compiles a linear layer with a random mask, and the same with none, and times both.

    Exactly ``round(sparsity * elements)`` weights are zero, at places drawn at random (seeded).
    The sparse side is bound to the best sparse layout even where dense would be predicted faster.

    Raises:
        ValueError: the results are wrong, so the times would mean nothing.
    """
    dense = nn.Linear(shape[1], shape[0], bias=False)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(tokens, shape[1], generator=generator)
    sparse = nn.Linear(shape[1], shape[0], bias=False)
    order = torch.randperm(weight.numel(), generator=generator)
    masked = weight.clone()
    masked.view(-1)[order[: round(sparsity * weight.numel())]] = 0
    with torch.no_grad():
        dense.weight.copy_(weight)
        sparse.weight.copy_(masked)
    layouts = _layouts(shape, int(masked.count_nonzero()), tokens, target, threads)
    with bound_threads(threads):
        calls = {
            "sparse": _compiled(sparse, x, layouts[0], target, threads),
            "dense": _compiled(dense, x, layouts[1], target, threads),
        }
        expected = x.double() @ masked.double().t()
        error = relative_error(calls["sparse"](x), expected)[1]
        if not error <= _TOLERANCE:
            raise ValueError(f"the kernel of {layouts[0]} is wrong by {error:.1e} of the scale")
        bound = {name: functools.partial(call, x) for name, call in calls.items()}
        samples = interleave(bound, _ROUNDS, _SECONDS)
    found = ratio(samples["sparse"], samples["dense"])
    times = samples["sparse"].median, samples["dense"].median
    return Imposed(sparsity, layouts[0], *times, found, error)


def _layouts(
    shape: tuple[int, int], nnz: int, tokens: int, target: str, threads: int
) -> tuple[str, str]:
    """Specs of the best sparse and the best dense layout, by predicted time."""
    from sparsify.codegen.cost import CpuCostModel
    from sparsify.codegen.target import Target
    from sparsify.layouts import Dense, PackedDense

    cost = CpuCostModel(Target.parse(target), threads)
    candidates = sorted(
        cost.candidates(shape, nnz, tokens),
        key=lambda layout: cost.linear_seconds(layout, shape, nnz, tokens),
    )
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for layout in candidates:
        kinds[layout.name in (Dense.name, PackedDense.name)].append(layout.spec)
    if not kinds[True] or not kinds[False]:
        raise ValueError(f"target {target!r} has no sparse and dense kernel to compare")
    return kinds[False][0], kinds[True][0]


def _compiled(layer: nn.Linear, x: torch.Tensor, layout: str, target: str, threads: int) -> Any:
    import sparsify
    from sparsify.passes import PORTABLE
    from sparsify.passes.propagate_lanes import PropagateLanes
    from sparsify.passes.select_layout import SelectLayout

    passes = (*PORTABLE, SelectLayout(layout=layout), PropagateLanes())
    return sparsify.compile(
        layer, (x,), target=target, num_threads=threads, dynamic_shapes=None, passes=passes
    )
