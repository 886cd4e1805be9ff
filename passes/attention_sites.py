"""Attention of a portable program: its sites, and what recipes that drop keys do to each head."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify import ops
from sparsify.band import Band
from sparsify.calibration import Calibration
from sparsify.passes.attention_trust import AttentionTrust
from sparsify.passes.graph import arguments, hint, is_tensor, same, shape_of
from sparsify.passes.mask_structure import ABSORBING
from sparsify.passes.sites import left_out, linear_site, site_name
from sparsify.patterns import Pattern
from sparsify.program import Program


@dataclass(frozen=True)
class AttentionSite:
    """One call of ``fused_attention``.

    Attributes:
        name: of the module whose projection makes the query, or the node's own.
        length: queries in the example inputs.
    """

    node: fx.Node
    name: str
    options: Mapping[str, Any]
    length: int

    @classmethod
    def of(cls, program: Program, node: fx.Node) -> AttentionSite:
        options = arguments(node)
        name = _projection(program, options["query"]) or node.name
        return cls(node, name, options, hint(shape_of(options["query"])[1]))

    @property
    def heads(self) -> int:
        return int(self.options["heads"])

    @property
    def band(self) -> Band:
        return Band(*(self.options[name] for name in ("causal", "window", "sinks")))

    def misfit(
        self, patterns: Sequence[str], block: int, disabled: Collection[str] = ()
    ) -> str | None:
        """Why a pattern of blocks cannot be applied.

        Args:
            patterns, disabled: shell patterns of the sites that are meant, and that are not.
        """
        query, key = (shape_of(self.options[name])[1] for name in ("query", "key"))
        reason = left_out(self.name, patterns, disabled=disabled)
        if reason is not None:
            return reason
        if not same(query, key):
            return "queries and keys differ in number, so that blocks have no places in common"
        if isinstance(query, int) and query <= block:
            return f"all {query} positions are in one block of {block}"
        return None


def attention_sites(program: Program) -> list[AttentionSite]:
    """Every attention of a program, in its order."""
    target = ops.fused_attention.overload
    return [
        AttentionSite.of(program, node) for node in program.graph.nodes if node.target == target
    ]


def measure(
    program: Program,
    calibration: Calibration,
    chosen: Sequence[Mapping[str, Pattern]],
    block: int,
) -> list[AttentionTrust]:
    """Runs the data through the dense program, and accounts for several choices at once.

    Args:
        chosen: patterns by the name of the site; a site that has none is not looked at.
        block: queries and keys of a block.
    """
    named = set().union(*chosen)
    sites = {site.node: site for site in attention_sites(program) if site.name in named}
    operands = {
        site.options[name]
        for site in sites.values()
        for name in ("query", "key", "value", "mask")
        if site.options[name] is not None
    }
    trusts = [AttentionTrust() for _ in chosen]
    values: dict[fx.Node, torch.Tensor] = {}

    def watch(node: fx.Node, result: torch.Tensor) -> None:
        if node in operands:
            values[node] = result
        if node in sites:
            parts = _operands(sites[node], values)
            for trust, patterns in zip(trusts, chosen, strict=True):
                pattern = patterns.get(sites[node].name)
                if pattern is not None:
                    kept = _kept(pattern, sites[node].heads, block, parts["query"].shape[2])
                    trust.observe(sites[node].name, kept=kept, **parts)

    calibration.run(program, watch, [*operands, *sites])
    return trusts


def _operands(site: AttentionSite, values: Mapping[fx.Node, torch.Tensor]) -> dict[str, Any]:
    """The arguments of `AttentionTrust.observe` but for what is kept."""
    o = site.options
    found: dict[str, Any] = {"scale": o["scale"], "softcap": o["softcap"]}
    counts = (o["heads"], o["kv_heads"], o["kv_heads"])
    for name, offset, count in zip(("query", "key", "value"), o["offsets"], counts, strict=True):
        x = values[o[name]][..., offset : offset + count * o["head_dim"]]
        found[name] = x.unflatten(-1, (count, o["head_dim"])).transpose(1, 2)
    at = [torch.arange(found[name].shape[2]) for name in ("query", "key")]
    visible = site.band(0, 0, at[0][:, None], at[1])
    if is_tensor(o["mask"]):
        mask = values[o["mask"]]
        added = mask.is_floating_point()
        visible = visible & (mask > ABSORBING if added else mask)
        found["bias"] = mask if added else None
    return {**found, "visible": visible}


def _kept(pattern: Pattern, heads: int, block: int, length: int) -> torch.Tensor:
    """``[heads or 1, length, length]`` of the blocks that a pattern reads."""
    marks = pattern.marks(-(-length // block), heads)
    place = torch.arange(length) // block
    return marks[:, place[:, None], place]


def _projection(program: Program, node: Any) -> str | None:
    """The module of the linear from which a query comes, past what turns and norms it."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target == ops.sparse_linear.overload:
            return site_name(linear_site(program, node).weight).rpartition(".")[0] or None
        node = next((a for a in node.all_input_nodes if is_tensor(a)), None)
    return None
