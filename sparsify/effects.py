"""Which values operators change in place, as their schemas say: ``Tensor(a!) keys``."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx


def written_by(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands that a call changes in place."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return ()
    written: list[fx.Node] = []
    for position, argument in enumerate(schema.arguments):
        if argument.is_write:
            given = position < len(node.args)
            value = node.args[position] if given else node.kwargs.get(argument.name)
            written += _nodes(value)
    return tuple(dict.fromkeys(written))


def _nodes(value: object) -> list[fx.Node]:
    items = value if isinstance(value, list | tuple) else [value]
    return [item for item in items if isinstance(item, fx.Node)]


def is_written(node: fx.Node) -> bool:
    """Whether a call changes this value in place."""
    return any(node in written_by(user) for user in node.users)


def is_view(node: fx.Node) -> bool:
    """Whether a call returns a view of an operand, by its schema."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def order_of_effects(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each call, the earlier ones that must stay before it.

    Two calls keep their order when they have an operand in common and one of them changes it.
    """
    writer: dict[fx.Node, fx.Node] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}
    before: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        before[node] = []
        written = written_by(node)
        for value in node.all_input_nodes:
            if value in writer:
                before[node].append(writer[value])
            if value in written:
                before[node] += readers.pop(value, [])
                writer[value] = node
            else:
                readers.setdefault(value, []).append(node)
    return before
