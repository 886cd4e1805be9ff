"""Dense feed-forward networks become mixtures of experts, of which a token runs some."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsify import ops
from sparsify.calibration import Calibration, as_calibration
from sparsify.contracts import PassContext, PassResult
from sparsify.passes.expert_split import FeedForward, Split, split
from sparsify.passes.graph import arguments, aten, erase_dead, shape_of, sole_user
from sparsify.passes.sites import is_disabled, linear_site, stored_weight
from sparsify.program import Program, ProgramSet
from sparsify.report import Decision
from sparsify.rewriter import Rewriter
from sparsify.routers import TopK

_TOKENS = 4096
"""Tokens of the calibration that are looked at, at most."""


@dataclass(frozen=True)
class Moefy:
    """A recipe: the neurons of a feed-forward network are split into experts.

    Before::

        x -> sparse_linear(W1, activation) -> sparse_linear(W2) -> y

    or with ``gated`` between the two. After::

        x -+-> sparse_linear(router) -> route("top_k{k=4}") -+
           +---------------------------------------------- experts(., W1, W2) -> + bias -> y

    Numbers change: a token runs ``top_k`` of the ``experts``, and gets the mean of the others. The
    report says by how much each network's output differs on the calibration. See
    `sparsify.passes.expert_split` for how neurons are split and what the router knows.

    Attributes:
        experts: of one network; it must have a multiple of them neurons.
        top_k: experts that a token runs.
        calibration: inputs of the model.
    """

    experts: int
    top_k: int
    calibration: Calibration

    name: ClassVar[str] = "moefy"
    tolerance: ClassVar[float] = float("inf")

    def __post_init__(self) -> None:
        if as_calibration(self.name, self.calibration) is None:
            raise ValueError(f"{self.name}: neurons are split by data; give calibration")
        if not 0 < self.top_k <= self.experts:
            raise ValueError(
                f"moefy: top_k={self.top_k} of {self.experts} experts; choose at least one expert "
                "and at most all"
            )

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        first = next(iter(programs))
        networks = {n.site: n for n in _networks(first)}
        if not networks:
            raise ValueError(
                "moefy: the program has no feed-forward network, two linears with an activation "
                "between them that nothing else reads; run it behind the portable passes"
            )
        samples = self._samples(first, networks.values())
        splits: dict[str, Split] = {}
        decisions = []
        for site, network in networks.items():
            reason = self._misfit(network, context)
            if reason is None:
                splits[site] = split(network.weights(), self.experts, self.top_k, samples[site])
            decisions.append(self._decision(network, splits.get(site), reason))
        done = []
        shared = dict(programs.weights)
        for program in programs:
            rewriter = Rewriter(program, shared)
            for network in _networks(rewriter):
                if network.site in splits:
                    self._rewrite(rewriter, network, splits[network.site])
            done.append(rewriter.finish())
        return PassResult(ProgramSet(tuple(done)), tuple(decisions))

    def _samples(self, program: Program, networks: Iterable[_Network]) -> dict[str, torch.Tensor]:
        """The inputs of each network over the calibration."""
        sites: dict[fx.Node, list[str]] = {}
        for network in networks:
            sites.setdefault(network.x, []).append(network.site)
        seen: dict[str, list[torch.Tensor]] = {site: [] for own in sites.values() for site in own}

        def watch(node: fx.Node, value: torch.Tensor) -> None:
            for site in sites[node]:
                seen[site].append(value.detach().reshape(-1, value.shape[-1]))

        self.calibration.run(program, watch, sites)
        return {site: _some(torch.cat(rows)) for site, rows in seen.items()}

    def _misfit(self, network: _Network, context: PassContext) -> str | None:
        if is_disabled(network.site, context.disabled_sites):
            return "switched off by the caller"
        if network.hidden % self.experts:
            return (
                f"its {network.hidden} neurons cannot be parted into {self.experts} equal experts"
            )
        return None

    def _decision(self, network: _Network, made: Split | None, reason: str | None) -> Decision:
        shape = tuple(map(int, linear_site(network.owner, network.up).shape))
        if made is None:
            assert reason is not None
            return Decision(network.site, "experts", "skipped", reason, self.name, shape)
        told = (
            f"{self.experts} experts of {network.hidden // self.experts} neurons, {self.top_k} a "
            f"token: {self.top_k / self.experts:.0%} of the multiplications; on the calibration "
            f"the cosine to the dense output is {made.cosine:.4f}"
        )
        return Decision(
            network.site, "experts", "rewritten", told, self.name, shape, error=made.error
        )

    def _rewrite(self, rewriter: Rewriter, network: _Network, made: Split) -> None:
        def weight(name: str, tensor: torch.Tensor) -> fx.Node:
            return rewriter.add_weight(f"{network.site}.{name}", tensor)

        x, down = network.x, arguments(network.down)
        count, _, in_features = made.up.shape
        out_features, hidden = made.down.shape[1:]
        with rewriter.graph.inserting_before(network.down):
            router = weight("router.weight", made.router)
            scores = rewriter.call(
                ops.sparse_linear.overload,
                (x, [router], "dense", count, in_features, weight("router.bias", made.router_bias)),
            )
            logits = rewriter.call(aten.reshape.default, (scores, [-1, count]))
            route = rewriter.call(ops.route.overload, (logits, TopK(self.top_k).spec, []))
            chosen = []
            for index in (0, 1):
                part = rewriter.graph.call_function(operator.getitem, (route, index))
                part.meta["val"] = route.meta["val"][index]
                chosen.append(part)
            weights = [weight("experts.up", made.up), weight("experts.down", made.down)]
            biases = [
                weight("experts.up_bias", made.up_bias),
                weight("experts.down_bias", made.down_bias),
            ]
            y = rewriter.call(
                ops.experts.overload,
                (
                    x, *chosen, weights[:1], weights[1:], biases, "dense", "dense",
                    count, out_features, hidden, in_features, network.activation, network.gated,
                ),
            )  # fmt: skip
            y = rewriter.call(aten.add.Tensor, (y, weight("experts.bias", made.bias)))
            if down["residual"] is not None:
                y = rewriter.call(aten.add.Tensor, (y, down["residual"]))
        rewriter.replace(network.down, y)
        erase_dead(rewriter, network.down)


def _some(rows: torch.Tensor) -> torch.Tensor:
    """At most `_TOKENS` rows, evenly spread."""
    if len(rows) <= _TOKENS:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, _TOKENS).long()]


@dataclass(frozen=True, eq=False)
class _Network:
    """A feed-forward network in a program.

    Attributes:
        up, down: its linears.
    """

    owner: Program | Rewriter
    up: fx.Node
    down: fx.Node
    activation: str
    gated: bool

    @property
    def site(self) -> str:
        return linear_site(self.owner, self.up).name

    @property
    def x(self) -> fx.Node:
        x: fx.Node = arguments(self.up)["x"]
        return x

    @property
    def hidden(self) -> int:
        return int(arguments(self.down)["in_features"])

    def weights(self) -> FeedForward:
        up, down = stored_weight(self.owner, self.up), stored_weight(self.owner, self.down)
        return FeedForward(
            up, down, self._bias(self.up, len(up)), self._bias(self.down, len(down)),
            self.activation, self.gated,
        )  # fmt: skip

    def _bias(self, linear: fx.Node, rows: int) -> torch.Tensor:
        bias = arguments(linear)["bias"]
        found = None if bias is None else self.owner.weight_of(bias)
        return torch.zeros(rows) if found is None else found.detach()


def _networks(owner: Program | Rewriter) -> list[_Network]:
    """Two linears with an activation or a gate between them that nothing else reads."""
    found = []
    for up in owner.graph.nodes:
        if up.target != ops.sparse_linear.overload or arguments(up)["residual"] is not None:
            continue
        options: dict[str, Any] = arguments(up)
        after, activation, gated = sole_user(up), options["activation"], False
        if after is not None and after.target == ops.gated.overload and activation == "none":
            after, activation, gated = sole_user(after), arguments(after)["activation"], True
        if activation == "none" and not gated:
            continue
        linear = after is not None and after.target == ops.sparse_linear.overload
        if after is None or not linear or arguments(after)["activation"] != "none":
            continue
        constant = all(
            arguments(n)["bias"] is None or owner.weight_of(arguments(n)["bias"]) is not None
            for n in (up, after)
        )
        if constant and isinstance(shape_of(up)[-1], int):
            found.append(_Network(owner, up, after, activation, gated))
    return found
