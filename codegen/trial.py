"""Linear kernels on trial: built together into one library, and called by hand.

A trial is ``y[tokens, out] = x[tokens, in] @ W.T`` with W in one layout, as it runs inside a
compiled region: activations in the form that so many tokens have, between conversions where the
layout's kernel takes the other form.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import tvm
from tvm.runtime import from_dlpack

from sparsify.codegen.build import build_kernels
from sparsify.codegen.kernels.cpu.lanes import FromLanes, ToLanes
from sparsify.codegen.registry import Kernel, LinearSite, linear_kernels
from sparsify.codegen.runtime import pool
from sparsify.codegen.runtime.executor import aligned
from sparsify.codegen.target import Target
from sparsify.layouts import LANES, Form, Layout, form_of
from sparsify.ops import to_lanes

_COLD_BYTES, _MOST_COPIES = 64 << 20, 256
"""Few tokens read each weight once a model's pass, long after the last time: trials of few tokens
take turns between copies of so many bytes together."""


@dataclass(frozen=True)
class Trial:
    """One layout of a weight of one shape, at a token count."""

    layout: Layout
    shape: tuple[int, int]
    tokens: int

    @property
    def form(self) -> Form:
        """The form in which the layout's kernel takes activations."""
        return linear_kernels(self.layout, self.tokens).form

    def kernels(self, target: Target) -> tuple[Kernel, ...]:
        """In the order in which they run."""
        isa, (out_features, in_features) = target.isa, self.shape
        linear = linear_kernels(self.layout, self.tokens)
        kernel = linear.kernel(isa, LinearSite(out_features, in_features), self.layout)
        if self.form == form_of(self.tokens):
            return (kernel,)
        if self.form == "lanes":
            return ToLanes(isa, in_features), kernel, FromLanes(isa, out_features)
        return FromLanes(isa, in_features), kernel, ToLanes(isa, out_features)


class TrialLibrary:
    """The kernels of trials, on our thread pool."""

    def __init__(self, target: Target, trials: Iterable[Trial]) -> None:
        self._target = target
        needed = {k.name: k for trial in trials for k in trial.kernels(target)}
        with tempfile.TemporaryDirectory(prefix="sparsify-trial-") as folder:
            path = Path(folder, "kernels.so")
            build_kernels(needed.values(), target).export_library(str(path))
            self._functions = tvm.runtime.load_module(str(path))
            pool.redirect(path)

    def bind(
        self,
        trial: Trial,
        packed: dict[str, torch.Tensor],
        x: torch.Tensor,
        resident: bool = False,
    ) -> tuple[Callable[[], None], torch.Tensor]:
        """A call of the trial, and the ``y[tokens, out]`` or ``[groups, out, 16]`` that it fills.

        Args:
            packed: the weight in the trial's layout.
            x: ``[tokens, in]``.
            resident: the model is so small that its weights stay in a cache.
        """
        out_features, outside = trial.shape[0], form_of(trial.tokens)
        xs = {"rows": x, "lanes": to_lanes.reference(x)}
        ys = {
            "rows": torch.zeros(trial.tokens, out_features),
            "lanes": torch.zeros(-(-trial.tokens // LANES), out_features, LANES),
        }
        given, taken = _argument(xs[trial.form]), from_dlpack(ys[trial.form])
        copies = cycle([[_argument(t) for t in copy] for copy in _copies(trial, packed, resident)])
        functions = [self._functions[kernel.name] for kernel in trial.kernels(self._target)]
        if trial.form == outside:
            (multiply,) = functions
            return lambda: multiply(given, *next(copies), taken), ys[outside]
        enter, multiply, leave = functions
        first, last = _argument(xs[outside]), from_dlpack(ys[outside])

        def call() -> None:
            enter(first, given)
            multiply(given, *next(copies), taken)
            leave(taken, last)

        return call, ys[outside]


def _argument(tensor: torch.Tensor) -> Any:
    return from_dlpack(aligned(tensor))


def _copies(
    trial: Trial, packed: dict[str, torch.Tensor], resident: bool
) -> Iterator[list[torch.Tensor]]:
    """The packed tensors, as often as they must be for none to be in a cache when it is read."""
    tensors = [packed[name] for name in trial.layout.tensors]
    yield tensors
    if form_of(trial.tokens) == "rows" and not resident:
        size = sum(tensor.nbytes for tensor in tensors)
        for _ in range(min(_MOST_COPIES, _COLD_BYTES // max(1, size))):
            yield [tensor.clone() for tensor in tensors]
