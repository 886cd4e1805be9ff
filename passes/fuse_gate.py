"""Gate and up projections of a gated feed-forward network run as one linear."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from sparsify import ops
from sparsify.contracts import GraphPass, PassContext
from sparsify.passes.elementwise import activation_of
from sparsify.passes.graph import arguments, aten, is_tensor, operand, past_copies, shape_of
from sparsify.passes.merge_linears import is_linear, is_off, merge
from sparsify.passes.strided import same_view, strided
from sparsify.report import Decision
from sparsify.rewriter import Rewriter


@dataclass(frozen=True)
class FuseGate(GraphPass):
    """``activation(gate) * up`` becomes ``gated``, on the result of one linear.

    Before::

        x -> linear(Wg) -> silu | gelu | relu | tanh -+-> mul
        x -> linear(Wu) ------------------------------+

    After::

        x -> linear(cat(Wg, Wu)) -> gated(., "silu")

    A linear that computes both already, gate first, is used as it is. Run it before
    `SparseLinear`.
    """

    name = "fuse_gate"
    tolerance = 1e-5

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        for node in rewriter.nodes:
            found = _gate(node)
            if found is None:
                continue
            both = _common_source(found)
            reason = None if both is not None else _misfit(rewriter, found, context)
            if reason is not None:
                yield Decision(node.name, "gate", "skipped", reason, self.name)
                continue
            with rewriter.graph.inserting_before(node):
                if both is None:
                    merged = merge(rewriter, (found.gate, found.up))
                    both, site = merged.node, merged.site
                    reason = f"gate and up run as one linear with {merged.shape[0]} rows"
                else:
                    site, reason = node.name, f"reads both halves of {both.name} where they lie"
                call = rewriter.call(ops.gated.overload, (both, found.activation))
            rewriter.replace(node, call)
            yield Decision(site, "gate", "rewritten", reason, self.name)


@dataclass(frozen=True)
class _Gate:
    activated: fx.Node
    activation: str
    gate: fx.Node
    up: fx.Node


def _gate(node: fx.Node) -> _Gate | None:
    """The parts of ``activation(gate) * up``, both of them linears or views."""
    if node.target != aten.mul.Tensor or not all(map(is_tensor, node.args[:2])):
        return None
    left, right = past_copies(operand(node)), past_copies(operand(node, 1))
    for activated, up in ((left, right), (right, left)):
        activation = activation_of(activated)
        if activation is None:
            continue
        gate = past_copies(operand(activated))
        linear = gate.target == aten.linear.default and up.target == aten.linear.default
        if linear or strided(gate).base is strided(up).base is not gate:
            return _Gate(activated, activation, gate, up)
    return None


def _common_source(found: _Gate) -> fx.Node | None:
    """The tensor of which gate and up are the first and the second half of the features."""
    gate, up = strided(found.gate), strided(found.up)
    base, shape = gate.base, shape_of(found.gate)
    if base is found.gate or gate.base is not up.base or not shape:
        return None
    width = shape[-1]
    whole = strided(base)
    if not isinstance(width, int) or whole.dims[-1:] != (((2 * width, 1),),):
        return None
    first = replace(whole, dims=(*whole.dims[:-1], ((width, 1),) if width > 1 else ()))
    second = replace(first, offset=width)
    return base if same_view(gate, first) and same_view(up, second) else None


def _misfit(rewriter: Rewriter, found: _Gate, context: PassContext) -> str | None:
    """Why gate and up cannot run as one linear."""
    gate, up = found.gate, found.up
    for name, linear in (("gate", gate), ("up", up)):
        if not is_linear(rewriter, linear):
            return f"the {name} is no linear with a constant weight"
    if arguments(gate)["input"] is not arguments(up)["input"]:
        return "gate and up have different inputs"
    if shape_of(gate)[-1] != shape_of(up)[-1]:
        return f"the gate has {shape_of(gate)[-1]} features, up {shape_of(up)[-1]}"
    for name, value in (("gate", gate), ("activated gate", found.activated), ("up", up)):
        if len(value.users) != 1:
            return f"{len(value.users)} nodes read the {name}"
    if is_off(rewriter, gate, context.disabled_sites) != is_off(
        rewriter, up, context.disabled_sites
    ):
        return "one of the two is switched off"
    dtype = gate.meta["val"].dtype
    return None if dtype == torch.float32 else f"activations are {dtype}, not float32"
