"""Mixtures of experts that are lists of modules, whose loops torch.export cannot trace.

    for e, expert in enumerate(self.experts):      # which tokens: only known when it runs
        y[tokens] += weight * expert(x[tokens])    -> sparsify::route, sparsify::experts

What such a module computes is not read from its code. Its parts are found (a list of equal networks
of linears, and the one linear with a result for each of them), and it is replaced for the export by
the first router of ours that gives what it gives on some numbers: few and many tokens, spread over
the experts and crowded on some (where a capacity shows), small and large (where a clamp shows). If
none does, it stays.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from sparsify.frontend.experts import activation_name, grouped_experts
from sparsify.ops import ACTIVATIONS
from sparsify.routers import Router, Seen, fitting, gates_of

_GATED = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
"""Names of the gate, of up and of down."""
_PLAIN = (("fc1", "fc2"), ("up_proj", "down_proj"), ("wi", "wo"), ("0", "2"))

_SCALES = (1.0, 10.0, 100.0)
"""Of the numbers on which a replacement must agree."""
_FEW = (2, 7)
"""Batch and length of most of them."""
_MOST = 512
"""Tokens of one probe at most: fewer where experts are so large that it would take long."""
_WORK = 1 << 35
"""Multiplications that a probe of many tokens may take."""
_FIRST = 64
"""Features of a result by which most routers are told from the right one."""
_TOLERANCE = 1e-4
"""Of the scale of what the module gives."""


@contextlib.contextmanager
def mixtures(model: nn.Module) -> Iterator[None]:
    """The model's mixtures of experts are computed by our operators meanwhile."""
    found = [(m, r) for m in model.modules() if (r := _replacement(m)) is not None]
    own = [module.__dict__.get("forward") for module, _ in found]
    try:
        for module, replacement in found:
            module.__dict__["forward"] = replacement
        with grouped_experts(model):
            yield
    finally:
        for (module, _), forward in zip(found, own, strict=True):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


@dataclass(frozen=True, eq=False)
class _Network:
    """The linears of one expert; ``gate`` is None where it has none."""

    gate: nn.Linear | None
    up: nn.Linear
    down: nn.Linear
    activation: str

    @classmethod
    def of(cls, expert: nn.Module) -> _Network | None:
        linears = {n: m for n, m in expert.named_children() if isinstance(m, nn.Linear)}
        others = [m for m in expert.children() if not isinstance(m, nn.Linear | nn.Dropout)]
        functions = others or [v for v in vars(expert).values() if callable(v)]
        names = [name for name in map(activation_name, functions[:1]) if name is not None]
        for wanted in (*_GATED, *_PLAIN):
            if set(wanted) == linears.keys() and names:
                *gate, up, down = (linears[name] for name in wanted)
                return cls(gate[0] if gate else None, up, down, names[0])
        return None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        opened = ACTIVATIONS[self.activation]((self.gate or self.up)(x))
        made: torch.Tensor = self.down(opened * self.up(x) if self.gate else opened)
        return made


@dataclass(frozen=True, eq=False)
class _Replacement:
    """A module's forward by our operators.

    Attributes:
        linear: that makes logits.
        router, parameters: of ours; ``returns_logits``: the module returns them as well.
    """

    linear: nn.Linear
    networks: tuple[_Network, ...]
    router: Router
    parameters: tuple[torch.Tensor, ...]
    returns_logits: bool

    def __call__(self, x: torch.Tensor) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        logits = self.linear(rows)
        experts, weights = torch.ops.sparsify.route(logits, self.router.spec, list(self.parameters))
        first = self.networks[0]
        gates: list[tuple[nn.Linear, ...]] = [
            (n.up,) if n.gate is None else (n.gate, n.up) for n in self.networks
        ]
        up = torch.stack([torch.cat([linear.weight for linear in own]) for own in gates])
        down = torch.stack([n.down.weight for n in self.networks])
        y = torch.ops.sparsify.experts(
            rows, experts, weights, [up], [down], self._biases(gates), "dense", "dense",
            len(self.networks), first.down.out_features, first.down.in_features,
            first.up.in_features, first.activation, first.gate is not None,
        )  # fmt: skip
        y = y.reshape(*x.shape[:-1], first.down.out_features)
        return (y, logits) if self.returns_logits else y

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        """What each expert counts for each token, ``[tokens, experts]``."""
        routes = self.router.route(logits, *self.parameters)
        return gates_of(*routes, len(self.networks))

    def eagerly(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The result of tokens, each expert on those that it gets."""
        gates, y = self.gates(logits), x.new_zeros(len(x), self.networks[0].down.out_features)
        for network, column in zip(self.networks, gates.T, strict=True):
            (tokens,) = torch.where(column != 0)
            if len(tokens):
                y[tokens] += column[tokens, None] * network(x[tokens])
        return y

    def _biases(self, gates: list[tuple[nn.Linear, ...]]) -> list[torch.Tensor]:
        downs = [n.down for n in self.networks]
        linears = [*(linear for own in gates for linear in own), *downs]
        if all(linear.bias is None for linear in linears):
            return []

        def of(linear: nn.Linear) -> torch.Tensor:
            none = linear.weight.new_zeros(linear.out_features)
            return none if linear.bias is None else linear.bias

        ups = [torch.cat([of(linear) for linear in own]) for own in gates]
        return [torch.stack(ups), torch.stack([of(down) for down in downs])]


def _replacement(module: nn.Module) -> _Replacement | None:
    """What computes the same as a module; None unless it is a mixture that we know."""
    lists = [m for m in module.children() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if len(lists) != 1:
        return None
    count = len(lists[0])
    others = [m for m in module.children() if m is not lists[0]]
    linears = [
        m
        for part in others
        for m in part.modules()
        if isinstance(m, nn.Linear) and _routes(m, count)
    ]
    networks = [n for n in map(_Network.of, lists[0]) if n is not None]
    if len(linears) != 1 or len(networks) != count or not _alike(networks):
        return None
    linear = linears[0]
    with torch.no_grad():
        try:
            probes = [
                _Probe.of(module, linear, tuple(networks), x) for x in _inputs(linear, networks)
            ]
        except Exception:
            return None
        if not all(probe.returns_logits in (None, True) for probe in probes):
            return None
        with_logits = probes[0].returns_logits is not None
        seen = _seen(module, others, linear, count)
        tries = (
            _Replacement(linear, tuple(networks), *found, with_logits)
            for found in fitting(seen, linear.out_features)
        )
        return next(
            (t for t in tries if probes[0].may_be(t) and all(p.agrees(t) for p in probes)), None
        )


def _routes(linear: nn.Linear, count: int) -> bool:
    """Whether its results may be logits of so many experts, or of trees over them."""
    return linear.out_features == count or linear.out_features % (2 * count - 1) == 0


def _seen(module: nn.Module, others: list[nn.Module], linear: nn.Linear, count: int) -> Seen:
    """What a module has beside its experts and the linear."""
    parts = [module, *(m for part in others for m in part.modules() if m is not linear)]
    numbers = [
        float(v)
        for part in parts
        for v in vars(part).values()
        if isinstance(v, int | float) and not isinstance(v, bool)
    ]
    tensors = [
        tensor.detach()
        for part in parts
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))
        if tensor.dtype == torch.float32
    ]
    return Seen(count, None, tuple(dict.fromkeys(numbers)), tuple(tensors))


def _inputs(router: nn.Linear, networks: list[_Network]) -> Iterator[torch.Tensor]:
    """Numbers that show what a mixture computes, the cheapest and most telling first."""
    generator = torch.Generator().manual_seed(0)
    size = router.in_features

    def normal(batch: int, length: int) -> torch.Tensor:
        return torch.randn(batch, length, size, generator=generator)

    yield normal(*_FEW)
    yield normal(1, 1)
    # Large, but not for the router, which tells experts apart as it did before.
    weight = router.weight.double()
    back = torch.linalg.pinv(weight)
    for scale in _SCALES[1:]:
        x = normal(*_FEW)
        part = (x.double() @ weight.T @ back.T).to(x.dtype)
        yield scale * (x - part) + part
        yield scale * x
    first = networks[0]
    each = sum(m.weight.numel() for m in (first.gate, first.up, first.down) if m is not None)
    many = max(math.prod(_FEW), min(_MOST, _WORK // (each * len(networks))))
    yield normal(1, many)
    yield normal(1, 1) + 1e-3 * normal(1, many)


@dataclass(frozen=True, eq=False)
class _Probe:
    """What a module gives on some numbers.

    Attributes:
        results: all tensors that it returns.
        logits: of its router.
        returns_logits: whether what it returns beside the first result is them; None: it returns
            one tensor.
    """

    x: torch.Tensor
    networks: tuple[_Network, ...]
    results: tuple[torch.Tensor, ...]
    logits: torch.Tensor
    returns_logits: bool | None

    @classmethod
    def of(
        cls,
        module: nn.Module,
        router: nn.Linear,
        networks: tuple[_Network, ...],
        x: torch.Tensor,
    ) -> _Probe:
        given, logits = module(x), router(x.flatten(0, 1))
        known = _close(given[1:], (logits,)) if isinstance(given, tuple) else None
        return cls(x, networks, _results(given), logits, known)

    @cached_property
    def made(self) -> torch.Tensor:
        """The first features that each expert makes of each token, ``[tokens, experts, some]``."""
        rows = self.x.flatten(0, 1)
        return torch.stack([network(rows)[:, :_FIRST] for network in self.networks], dim=1)

    def may_be(self, replacement: _Replacement) -> bool:
        """Whether a replacement gives the same first features, without running an expert again."""
        fair = replacement.router.decided(self.logits, *replacement.parameters)
        found = torch.einsum("te,teo->to", replacement.gates(self.logits), self.made)
        wanted = self.results[0].flatten(0, 1)[:, :_FIRST]
        return found.shape == wanted.shape and _close((found[fair],), (wanted[fair],))

    def agrees(self, replacement: _Replacement) -> bool:
        """Whether a replacement gives the same, but for tokens that may go to several experts."""
        fair = replacement.router.decided(self.logits, *replacement.parameters)
        found = replacement.eagerly(self.x.flatten(0, 1), self.logits)
        wanted, *also = self.results
        if found.shape != wanted.flatten(0, 1).shape:
            return False
        logits = (self.logits,) if replacement.returns_logits else ()
        return _close((found[fair], *logits), (wanted.flatten(0, 1)[fair], *also))


def _alike(networks: list[_Network]) -> bool:
    kinds = {
        (n.gate is None, n.up.weight.shape, n.down.weight.shape, n.activation) for n in networks
    }
    return len(kinds) == 1


def _results(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _close(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    if len(found) != len(wanted):
        return False
    pairs = zip(found, wanted, strict=True)
    return all(
        isinstance(f, torch.Tensor)
        and isinstance(w, torch.Tensor)
        and f.shape == w.shape
        and (
            f.numel() == 0
            or bool((f - w).abs().max() <= _TOLERANCE * w.abs().max().clamp_min(1e-30))
        )
        for f, w in pairs
    )
