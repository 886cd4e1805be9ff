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
from typing import Any

import torch
from torch import nn

from sparsify.frontend.experts import activation_name, grouped_experts
from sparsify.routers import parse

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


@dataclass(frozen=True, eq=False)
class _Replacement:
    """A module's forward by our operators.

    Attributes:
        router: the linear that makes logits.
        spec: of the router of ours; ``returns_logits``: the module returns them as well.
    """

    router: nn.Linear
    networks: tuple[_Network, ...]
    spec: str
    returns_logits: bool

    def __call__(self, x: torch.Tensor) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows)
        experts, weights = torch.ops.sparsify.route(logits, self.spec, self._parameters(logits))
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

    def undecided(self, logits: torch.Tensor) -> torch.Tensor:
        """The tokens ``[tokens]`` whose last expert scores as the next: sigmoids round to one."""
        k = parse(self.spec).slots(len(self.networks))
        if not self.spec.startswith("sigmoid") or k == len(self.networks):
            return torch.zeros(len(logits), dtype=torch.bool)
        scores = logits.sigmoid().topk(k + 1, dim=-1).values
        return scores[:, k - 1] == scores[:, k]

    def _parameters(self, logits: torch.Tensor) -> list[torch.Tensor]:
        if not self.spec.startswith("sigmoid"):
            return []
        return [logits.new_zeros(logits.shape[1]), logits.new_ones(1)]

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
    routers = [m for m in module.children() if isinstance(m, nn.Linear) and m.out_features == count]
    networks = [n for n in map(_Network.of, lists[0]) if n is not None]
    if len(routers) != 1 or len(networks) != count or not _alike(networks):
        return None
    with torch.no_grad():
        try:
            probes = [_Probe.of(module, routers[0], x) for x in _inputs(routers[0], networks)]
        except Exception:
            return None
        if not all(probe.returns_logits in (None, True) for probe in probes):
            return None
        with_logits = probes[0].returns_logits is not None
        tries = (
            _Replacement(routers[0], tuple(networks), spec, with_logits) for spec in _specs(count)
        )
        return next((t for t in tries if all(probe.agrees(t) for probe in probes)), None)


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
    results: tuple[torch.Tensor, ...]
    logits: torch.Tensor
    returns_logits: bool | None

    @classmethod
    def of(cls, module: nn.Module, router: nn.Linear, x: torch.Tensor) -> _Probe:
        given, logits = module(x), router(x.flatten(0, 1))
        known = _close(given[1:], (logits,)) if isinstance(given, tuple) else None
        return cls(x, _results(given), logits, known)

    def agrees(self, replacement: _Replacement) -> bool:
        """Whether a replacement gives the same, but for tokens that may go to several experts."""
        fair = ~replacement.undecided(self.logits)
        first, *others = _results(replacement(self.x))
        wanted, *also = self.results
        if first.shape != wanted.shape:
            return False
        found = (first.flatten(0, 1)[fair], *others)
        return _close(found, (wanted.flatten(0, 1)[fair], *also))


def _alike(networks: list[_Network]) -> bool:
    kinds = {
        (n.gate is None, n.up.weight.shape, n.down.weight.shape, n.activation) for n in networks
    }
    return len(kinds) == 1


def _specs(count: int) -> Iterator[str]:
    """Routers that need no parameters of their own."""
    for k in range(1, count + 1):
        for normalise in (1, 0):
            yield f"softmax_top_k{{k={k},normalise={normalise}}}"
            yield f"sigmoid_top_k{{k={k},normalise={normalise},groups=1,kept=1}}"


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
