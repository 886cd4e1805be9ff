"""Projections that share an input run as one linear."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from sparsify import ops
from sparsify.contracts import GraphPass, PassContext
from sparsify.passes.graph import arguments
from sparsify.passes.heads import features_of
from sparsify.passes.merge_linears import is_linear, is_off, merge
from sparsify.report import Decision
from sparsify.rewriter import Rewriter

_ATTENTION = ops.fused_attention.overload
_PAGED = ops.paged_attention.overload
_APPEND = ops.kv_append.overload
_ROTARY = ops.rotary.overload


@dataclass(frozen=True)
class MergeProjections(GraphPass):
    """Linears of one input that only feed one attention become one, its rows concatenated.

    Before::

        x -> linear(Wq) --+
        x -> linear(Wk) --+-> fused_attention(q, k, v, offsets=[0, 0, 0])
        x -> linear(Wv) --+

    After::

        x -> linear(cat(Wq, Wk, Wv)) -> fused_attention(y, y, y, offsets=[0, q_rows, q_rows+k_rows])

    Rotations between the two become one, of all the heads that had one; the others are behind them.
    The attention may also be one over the paged cache, with the append to it.

    Before::

        x -> linear(Wq) -> rotary(., h) -------------------------------+
        x -> linear(Wk) -> rotary(., kv) -> kv_append(k, v, [0, 0]) ---+-> paged_attention(q, 0)
        x -> linear(Wv) ------------------+

    After::

        x -> linear(cat(Wq, Wk, Wv)) -> rotary(., h + kv) = y
        kv_append(y, y, [q_rows, q_rows + k_rows]) -> paged_attention(y, 0)

    It also reads parts of a projection that is packed already where they lie, by offset.

    In cross attention, keys and values share. A missing bias is filled with zeros when another
    projection has one. Run it after `FuseAttention`.
    """

    name = "merge_projections"
    tolerance = 1e-5

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        for node in rewriter.nodes:
            slots = _slots(node)
            readers = {slot.reader for slot in slots}
            groups: dict[tuple[fx.Node, bool], list[_Projection]] = {}
            for slot in slots:
                found = _projection(rewriter, slot, readers)
                if found is not None:
                    off = is_off(rewriter, found.linear, context.disabled_sites)
                    key = (arguments(found.linear)["input"], off)
                    groups.setdefault(key, []).append(found)
            for group in map(_alike, groups.values()):
                if len({p.linear for p in group}) > 1:
                    yield self._merge(rewriter, group)
            if node.target == _PAGED:
                yield from self._read_cuts(rewriter, slots)

    def _read_cuts(self, rewriter: Rewriter, slots: list[_Slot]) -> Iterable[Decision]:
        for slot in slots:
            value = slot.value
            part = features_of(value)
            if part is None or part.base is value:
                continue
            with rewriter.graph.inserting_before(slot.reader):
                slot.send(part.rows(rewriter), part.offset)
            reason = f"{slot.operand} is read at feature {part.offset} of {part.base.name}"
            yield Decision(slot.reader.name, "attention", "rewritten", reason, self.name)

    def _merge(self, rewriter: Rewriter, group: list[_Projection]) -> Decision:
        # A rotation turns the first heads, so those that have one come first.
        group.sort(key=lambda p: p.rotary is None)
        linears = list(dict.fromkeys(p.linear for p in group))
        merged = merge(rewriter, linears)
        result = merged.node
        turned = list(dict.fromkeys(p.rotary for p in group if p.rotary is not None))
        if turned:
            options = [arguments(rotary) for rotary in turned]
            heads = sum(o["heads"] for o in options)
            angles = (options[0]["cos"], options[0]["sin"])
            with rewriter.graph.inserting_before(min(turned)):
                result = rewriter.call(
                    _ROTARY, (merged.node, *angles, heads, options[0]["head_dim"])
                )
        for projection in group:
            projection.slot.send(result, merged.starts[projection.linear])
        with_rotary = f", {len(turned)} rotations as one" if len(turned) > 1 else ""
        return Decision(
            merged.site,
            "linear",
            "rewritten",
            f"{len(linears)} projections of one input run as one linear with "
            f"{merged.shape[0]} rows{with_rotary}",
            self.name,
            shape=merged.shape,
        )


@dataclass(frozen=True)
class _Slot:
    """An operand of attention that is read at an offset of its features.

    Attributes:
        position: where in the list of offsets its own stands, None for a single ``offset``.
    """

    reader: fx.Node
    operand: str
    position: int | None

    @property
    def value(self) -> fx.Node:
        return arguments(self.reader)[self.operand]

    def send(self, value: fx.Node, start: int) -> None:
        """Reads ``value`` instead, ``start`` features further on."""
        options = arguments(self.reader)
        options[self.operand] = value
        if self.position is None:
            options["offset"] += start
        else:
            offsets = list(options["offsets"])
            offsets[self.position] += start
            options["offsets"] = offsets
        self.reader.args = tuple(options.values())


@dataclass(frozen=True)
class _Projection:
    """A linear whose result, perhaps after a rotation, only attention reads."""

    slot: _Slot
    linear: fx.Node
    rotary: fx.Node | None


def _slots(node: fx.Node) -> list[_Slot]:
    """Query, key and value of an attention; no slots for any other node."""
    if node.target == _ATTENTION:
        return [_Slot(node, name, i) for i, name in enumerate(("query", "key", "value"))]
    if node.target != _PAGED:
        return []
    query = _Slot(node, "query", None)
    append = arguments(node)["lengths"]
    if append.target != _APPEND:
        return [query]
    return [query, _Slot(append, "key", 0), _Slot(append, "value", 1)]


def _projection(rewriter: Rewriter, slot: _Slot, readers: set[fx.Node]) -> _Projection | None:
    node, rotary = slot.value, None
    if not _is_private(node, readers):
        return None
    if node.target == _ROTARY:
        options = arguments(node)
        rotary, node = node, options["x"]
        whole = node.meta["val"].shape[-1] == options["heads"] * options["head_dim"]
        if not whole or set(node.users) != {rotary}:
            return None
    return _Projection(slot, node, rotary) if is_linear(rewriter, node) else None


def _is_private(node: fx.Node, readers: set[fx.Node]) -> bool:
    """Whether attention alone reads a node, and as nothing but query, key or value."""
    return set(node.users) <= readers and all(
        value is not node or name in ("query", "key", "value")
        for reader in node.users
        for name, value in arguments(reader).items()
    )


def _alike(group: list[_Projection]) -> list[_Projection]:
    """Those that the first rotation of the group, if there is one, can stand for."""
    kinds = [_angles(p.rotary) for p in group if p.rotary is not None]
    return [p for p in group if p.rotary is None or _angles(p.rotary) == kinds[0]]


def _angles(rotary: fx.Node) -> tuple[object, ...]:
    options = arguments(rotary)
    return options["cos"], options["sin"], options["head_dim"]
